"""The rows of docs/faults.md on the store: it cannot be written before the start, or is lost while a point is measured.

Real disks: a small one that fills up or becomes read-only is a tmpfs of the test's own, for which it must be allowed to
mount one.
"""

import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess

import faults
import pytest
from cli import TOY, error_line, pi0exp, processes, runs, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STORE = [fault for fault in faults.FAULTS if fault.where == faults.STORE]
BEFORE = [fault for fault in STORE if fault.outcome == faults.REFUSED]
MEANWHILE = [fault for fault in STORE if fault not in BEFORE]
POINT = (*TOY, "+subject.fault=wait")
DISK_BYTES = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder)
    if made.returncode:
        pytest.skip(f"mounts a small disk, which this user may not: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*words: object) -> CompletedProcess[str]:
    return subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Somebody else takes every byte of the disk of the folder, and each one that becomes free."""
    file, done = folder / "ballast", threading.Event()

    def fill() -> None:
        with file.open("wb", buffering=0) as ballast:
            while not done.wait(0.001):
                for size in (1 << 20, 1 << 12):
                    with suppress(OSError):
                        while ballast.write(bytes(size)):
                            pass

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    while os.statvfs(folder).f_bavail:
        time.sleep(0.01)
    yield
    done.set()
    thread.join()
    file.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Whoever opens a file there from now on may only read it."""
    for words in (("--bind", folder, folder), ("-o", "remount,bind,ro", folder)):
        assert _mount(*words).returncode == 0
    yield
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def deleted(root: Path) -> Iterator[None]:
    shutil.rmtree(root)
    yield


@contextmanager
def no_artifacts(root: Path) -> Iterator[None]:
    """The folder of the study's files is moved away, a file stands in its place."""
    folder, away = root / "adhoc", root / "moved"
    folder.rename(away)
    folder.write_text("in the way")
    yield
    folder.unlink()
    away.rename(folder)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    with sqlite3.connect(root / "mlflow.db", isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    connection.close()


LOSSES: dict[str, Callable[[Path], object]] = {
    "deleted": deleted,
    "no_artifacts": no_artifacts,
    "locked": locked,
    "full": lambda root: full(root.parent),
    "read_only": lambda root: read_only(root.parent),
}
"""How the store in a folder is lost; afterwards it is there again."""


def test_each_row_is_injected():
    assert {fault.name for fault in MEANWHILE} == LOSSES.keys()
    assert {fault.name for fault in BEFORE} == {"no_folder", "full_before", "read_only_before"}


@pytest.mark.parametrize("row", BEFORE, ids=lambda row: row.name)
def test_store_that_cannot_be_written_before_the_start(row, tmp_path, request):
    with ExitStack() as damage:
        root = tmp_path / "mlruns"
        if row.name == "no_folder":
            root.write_text("in the way")
        else:
            root = request.getfixturevalue("disk") / "mlruns"
            damage.enter_context((full if row.name == "full_before" else read_only)(root.parent))
        done = pi0exp(root, *TOY, "+subject.fault=none", scratch=tmp_path)
        assert row.reason in error_line(done, code=row.code)
        assert done.stdout == ""
    if row.name == "no_folder":
        root.unlink()
    again = pi0exp(root, *TOY, "+subject.fault=none", scratch=tmp_path)
    assert again.returncode == 0, again
    assert [run.data.tags["outcome"] for run in runs(root)] == ["ok"], "nothing of the first start is there"


@pytest.mark.parametrize("row", MEANWHILE, ids=lambda row: row.name)
def test_store_that_is_lost_while_a_point_is_measured(row, tmp_path, request):
    on_disk = row.name in ("full", "read_only")
    root = (request.getfixturevalue("disk") if on_disk else tmp_path) / "mlruns"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    process = start(root, *POINT, scratch=scratch)
    try:
        for line in process.stderr:
            if "fault wait" in line:
                break
        else:
            pytest.fail("it was never measured")
        with LOSSES[row.name](root):
            [child] = scratch.glob("pi0exp-????????/experiment.json")
            child.with_name("go").touch()
            out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    told = [line for line in err.splitlines() if not line.startswith("[")]
    assert process.returncode == row.code, err
    assert len(told) == 1, err
    assert row.reason in told[0]
    assert "the next start brings it into the store" in told[0]
    assert "outcome  ok" in out
    kept = Path(told[0].partition("the result is kept in ")[2].partition(", the next")[0])
    assert kept.is_file(), "once the store is there again, so is the result"
    beside = kept.is_relative_to(root)
    assert beside is (row.kept == faults.FILE)
    assert beside or kept.is_relative_to(scratch / f"pi0exp-spool-{os.getuid()}")
    assert processes(scratch / "pi0exp-") == []

    again = pi0exp(root, *POINT, scratch=scratch)
    assert again.returncode == 0, again
    assert again.stderr.splitlines() == [f"pi0exp: {kept} was brought into the store"]
    assert "already measured" in again.stdout
    assert not kept.exists()
    [run] = runs(root)
    assert run.data.tags["outcome"] == "ok"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["latency_ms/p50"] > 0
    assert list((root / ".spool").glob("*.json")) == list((root / ".spool").glob(".*.room")) == []
