"""Commands as a user gives them, and what they leave in the store and among the processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from stores import laid

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
QUICK = (
    "model=tiny",
    "measure=quick",
    "measure.samples=3",
    "measure.warmup_calls=2",
    "measure.warmup_s=0",
    "measure.warmup_max_s=0",
    "measure.host_samples=1",
    "measure.stage_samples=1",
    "measure.device=cpu",
)
TOY = ("subject._target_=toy_subjects.Toy", *QUICK[1:])


def environment(scratch: Path) -> dict[str, str]:
    """Temporary files under `scratch`, toy subjects importable, no settings of whoever runs the tests."""
    ours = ("PI0EXP_", "MLFLOW_", "HYDRA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    # Tensors this small are fastest on one thread.
    return kept | {"PYTHONPATH": path, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}


def start(
    root: Path, *words: str, scratch: Path | None = None, store: bool = True, **variables: str
) -> subprocess.Popen[str]:
    """`python -m pi0exp` with its store in `root`, in a process group of its own.

    scratch: for its temporary files, `root` unless it is given. store: an empty one is there before it starts, if it is
    its folder's first; else the command makes it. variables: of its environment, beside the usual ones.
    """
    if scratch is None:
        root.mkdir(parents=True, exist_ok=True)
    if store:
        laid(root)
    return subprocess.Popen(
        [sys.executable, "-m", "pi0exp", f"track.root={root}", *words],
        cwd=REPOSITORY,
        env=environment(scratch or root) | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """A test run in the background of a script has Ctrl-C ignored, and so would all that it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def pi0exp(
    root: Path,
    *words: str,
    scratch: Path | None = None,
    timeout_s: float = 300,
    store: bool = True,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    process = start(root, *words, scratch=scratch, store=store, **variables)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_here(words: list[str]) -> int:
    """`python -m pi0exp WORDS` in this process, which a fork calls: its exit code."""
    from pi0exp.__main__ import main

    sys.argv[1:] = words
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    raise AssertionError("the command ends with an exit code")


def module(name: str, *words: object, cwd: Path = REPOSITORY, scratch: Path) -> subprocess.CompletedProcess[str]:
    """`python -m NAME WORDS`."""
    line = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(line, cwd=cwd, env=environment(scratch), capture_output=True, text=True, timeout=300)


def error_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The only line on stderr of a command that was refused."""
    assert done.returncode == code, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pi0exp: ")
    return lines[0].removeprefix("pi0exp: ")


def runs(root: Path, study: str = "adhoc") -> list[Run]:
    """The study's runs as MLflow has them, the first one first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def artifact(root: Path, run: Run, name: str) -> Path:
    [path] = root.glob(f"*/{run.info.run_id}/artifacts/{name}")
    return path


def processes(word: Path) -> list[str]:
    """Command lines of the processes that name `word`."""
    found: list[Any] = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended meanwhile
        if str(word) in line:
            found.append(line)
    return found
