"""The report's page as Chromium shows it: laptop and phone, light and dark, without network.

Needs Debian's packages chromium and chromium-driver, and selenium.
"""

import base64
import io
import os
import shutil

import numpy as np
import pytest
import report_fakes as fakes
from PIL import Image

from pi0exp.report import document, files, page, sources
from pi0exp.report.chapters import chapters
from pi0exp.report.study import Study

SCREENS = {"laptop": (1280, 800), "phone": (390, 844), "small phone": (360, 640), "tablet": (820, 1180)}
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {' and '.join(MISSING)}: apt-get install chromium chromium-driver"
    ),
]

MEASURE = """
const root = document.documentElement;
const shown = element => element.getClientRects().length > 0;
const small = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !shown(element) || ['TITLE', 'STYLE'].includes(element.tagName.toUpperCase())) continue;
  const svg = element.closest('svg');
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(getComputedStyle(element).fontSize) * scale;
  if (size < 11.5) small.push([element.tagName, element.textContent.slice(0, 40), size]);
}
const wide = [...document.querySelectorAll('body *')].filter(element => shown(element)
  && !element.closest('.scroll') && !element.closest('svg') && element.getBoundingClientRect().right > innerWidth + 1);
const cut = [...document.querySelectorAll('svg text')].filter(shown).filter(element => {
  const own = element.getBoundingClientRect(), svg = element.closest('svg').getBoundingClientRect();
  return own.left < svg.left - 1 || own.right > svg.right + 1 || own.top < svg.top - 1 || own.bottom > svg.bottom + 1;
});
const names = elements => elements.map(element => element.tagName + ' ' + element.textContent.slice(0, 60));
return {overflow: root.scrollWidth - innerWidth, small: small, wide: names(wide), cut: names(cut),
  plots: [...document.querySelectorAll('figure')].map(one => [...one.querySelectorAll('svg')].filter(shown).length),
  boxes: [...document.querySelectorAll('figure svg')].filter(shown).map(svg => {
    const box = svg.getBoundingClientRect(); return [box.x + scrollX, box.y + scrollY, box.width, box.height]; }),
  ground: getComputedStyle(root).backgroundColor, asked: performance.getEntriesByType('resource').map(one => one.name)};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    for flag in flags:
        options.add_argument(flag)
    found = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of the committed results, and one with every plot."""
    folder = tmp_path_factory.mktemp("pages")
    measured = sources.sorted_out([*fakes.ladder(), *fakes.batches()])
    shown = ["waterfall", "kernels", "power", "roofline", "pareto", "bars"]
    ladder = fakes.configured(label=["stack"], plots=shown, answer="ladder")
    metrics = ["latency_ms/p50", "throughput_hz", "energy_j/call", "roofline/share"]
    curves = {"label": ["stack", "workload.batch_size"], "x": "workload.batch_size", "series": ["stack"]}
    batches = fakes.configured(**curves, plots=["curve"], metrics=metrics, answer="scaling")
    studies = (
        Study("ladder", "What does each step add?", ("python -m pi0exp study=ladder",), ladder),
        Study("batch_scaling", "What does a batch bring?", (), batches),
        Study("masking", "What do masks cost?"),
    )
    made = {
        "committed": page.page(chapters([], sources.committed)),
        "made_up": page.page([document.chapter(one, measured, []) for one in studies]),
    }
    return {name: files.put(folder / name / "index.html", content) for name, content in made.items()}


def shown(browser, path, screen, scheme):
    width, height = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": "phone" in screen}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    return browser.execute_script(MEASURE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["committed", "made_up"])
def test_page(browser, pages, name, screen, scheme):
    found = shown(browser, pages[name], screen, scheme)
    assert found["overflow"] <= 0
    assert found["wide"] == []
    assert found["small"] == []
    assert found["cut"] == []
    assert found["asked"] == []
    assert found["plots"], "no plot"
    assert set(found["plots"]) == {1}, "one picture a figure is shown, the one that fits"
    assert (found["ground"] == "rgb(255, 255, 255)") == (scheme == "light")
    for x, y, width, height in found["boxes"]:
        # Scrolled to, since Chromium takes another place for one that is further down than 32000 pixels.
        browser.execute_script("window.scrollTo({top: arguments[0], behavior: 'instant'})", y)
        top = y - browser.execute_script("return window.scrollY")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        right, bottom = min(x + width, picture.width), min(top + height, picture.height)
        colours = np.asarray(picture.crop((x, top, right, bottom))).reshape(-1, 3)
        assert len(colours) > 1000
        ground = np.array([int(part) for part in found["ground"].strip("rgb()").split(",")])
        marked = (np.abs(colours.astype(int) - ground).max(axis=1) > 60).mean()
        assert marked > 0.005, f"an empty plot at {x}, {y}"


def test_picture_of_the_readme_follows_the_scheme(browser, tmp_path):
    config = fakes.configured(label=["stack"])
    chapter = document.chapter(Study("ladder", "?", (), config), sources.sorted_out(fakes.ladder()), [])
    (tmp_path / "ladder.svg").write_text(files.picture(chapter))
    (tmp_path / "readme.html").write_text('<img src="ladder.svg">')
    grounds = []
    for scheme in ("light", "dark"):
        shown(browser, tmp_path / "readme.html", "laptop", scheme)
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        file = tmp_path / f"{scheme}.png"
        file.write_bytes(base64.b64decode(taken["data"]))
        grounds.append(Image.open(file).convert("RGB").getpixel((30, 400)))
    assert sum(grounds[0]) > 700
    assert sum(grounds[1]) < 150
