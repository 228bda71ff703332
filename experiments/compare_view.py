"""Make docs/compare_view.png: MLflow's compare view of a study's committed results, as a headless Chromium shows it.

    python experiments/compare_view.py ladder docs/compare_view.png --where "params.stack != '0_eager'" \\
        --metrics kernels_ms/gemm energy_j/call latency_ms/p50

Loads the results into a store of its own, starts MLflow's UI on it, clicks what a user would click, and takes the
picture. Needs the packages mlflow (mlflow-skinny has no UI) and selenium, and Chromium with its driver: Debian's
packages chromium and chromium-driver. Exit code 2 where one of them is missing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PATIENCE_S = 120.0
"""How long MLflow and its pages may take to answer."""
SETTLE_S = 3.0
"""For a plot to be drawn anew after a click."""
SIZE = (1280, 1715)
"""Of the window, in pixels: down to the parameters. The table of metrics below them begins with the ceilings."""
PARAMS, METRICS = ("stack", "attention", "fusion"), ("error/rel_l2", "latency_ms/p50")
"""The axes of the plot, if no others are named."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("image", type=Path)
    parser.add_argument("--where", default="", help="filter of runs, in MLflow's search language")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="axes of the plot; the last one colours")
    given = parser.parse_args()
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    missing += [name for name in ("mlflow.server", "selenium") if not _there(name)]
    if missing:
        print(f"this machine lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        uri, experiment, runs = stored(given.study, given.where, Path(folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = address.rpartition(":")[2]
        ui = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", port, "--backend-store-uri", uri]
        with subprocess.Popen(ui, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                wait_for(address)
                # The page that selecting these runs and clicking Compare leads to.
                query = urllib.parse.urlencode({"runs": json.dumps(runs), "experiments": json.dumps([experiment])})
                given.image.parent.mkdir(parents=True, exist_ok=True)
                picture(f"{address}/#/compare-runs?{query}", given.image, paths, f"{folder}/profile", given.metrics)
            finally:
                server.terminate()
    print(f"{given.image}: {len(runs)} runs, {given.image.stat().st_size / 1e3:.0f} kB")
    return 0


def stored(study: str, where: str, root: Path) -> tuple[str, str, list[str]]:
    """Load a study's committed results below `root`: the store's address, MLflow's id of the study, its runs' ids."""
    from mlflow import MlflowClient

    load = [sys.executable, "-m", "pi0exp.load", str(ROOT / "experiments" / "results" / study), "--root", str(root)]
    subprocess.run(load, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    uri = f"sqlite:///{next(root.rglob('mlflow.db'))}"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study).experiment_id
    runs = client.search_runs([experiment], where, order_by=["metrics.`latency_ms/p50` DESC"])
    return uri, experiment, [run.info.run_id for run in runs]


def wait_for(address: str) -> None:
    """Returns when a server answers; TimeoutError after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise TimeoutError(f"MLflow's UI did not answer at {address} within {PATIENCE_S:.0f} s") from None
            time.sleep(0.5)


def picture(address: str, image: Path, paths: dict[str, Any], profile: str, metrics: list[str]) -> None:
    """The compare view as a PNG file: side panels closed, the axes of the plot chosen."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    # As root Chromium has no sandbox; what it would fetch from its makers in the background is turned off.
    flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    flags += [f"--window-size={SIZE[0]},{SIZE[1]}", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    for flag in flags:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(paths["chromedriver"]))
    try:
        browser.get(address)

        def found(css: str) -> Any:
            return WebDriverWait(browser, PATIENCE_S).until(lambda b: b.find_element(By.CSS_SELECTOR, css))

        for button in (
            "[aria-label='Parameters - Show diff only']",
            "[aria-label='Metrics - Show diff only']",
            "[aria-label='Toggle sidebar']",
            "[aria-label=Close]",
        ):
            found(button).click()
        browser.find_element(By.XPATH, "//button[normalize-space()='Clear All']").click()
        for number, names in enumerate((PARAMS, metrics), 1):
            for name in names:
                field = found(f"#dubois-select-{number}")
                field.send_keys(name)
                time.sleep(1)
                field.send_keys(Keys.ENTER)
            field.send_keys(Keys.ESCAPE)
        browser.execute_script("document.querySelectorAll('*').forEach(element => { element.scrollTop = 0; })")
        time.sleep(SETTLE_S)
        browser.save_screenshot(str(image))
    finally:
        browser.quit()


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
