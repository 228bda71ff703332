"""Real errors of a real GPU are outcomes with the GPU's own words, and leave it clean for the next point.

Run it alone on the GPU: what is left there is told from what was there before.
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from cli import QUICK, artifact, pi0exp, processes, runs, start

from pi0exp.passes import state
from pi0exp.sensors import open_sensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

TIMEOUT_S = 60
"""For a point that hangs; the others take a third of it."""
EXPECTED = {
    "none": ("ok", ""),
    "gpu_oom": ("oom", "out of memory"),
    "gpu_assert": ("error", "device-side assert triggered"),
    "gpu_illegal": ("error", "illegal memory access"),
    "gpu_hang": ("timeout", f"no result after {TIMEOUT_S} s (measure.timeout_s)"),
}
"""Fault -> its outcome, and what the reason must hold."""
SWEEP = ["gpu_oom", "gpu_assert", "gpu_illegal", "gpu_hang", "none"]
CONTEXT_MB = 150.0
"""A process that computes on a GPU takes more of it, without any tensor."""
CLEAN_S = 30.0
"""How long the driver may take to take back what a dead process had."""


class Gpu:
    """What is on the GPU beside what was there when the test began."""

    def __init__(self) -> None:
        self.sensors = open_sensors(torch.device("cuda", 0))
        self.before, self.free = self._processes(), self._free_mb()

    def _processes(self) -> set[int]:
        return set(state(self.sensors).processes)  # none where the driver tells of none, as in some containers

    def _free_mb(self) -> float:
        return torch.cuda.mem_get_info()[0] / 2**20  # of the whole GPU, whoever took it

    def added_mb(self) -> float:
        return self.free - self._free_mb()

    def strangers(self) -> set[int]:
        return self._processes() - self.before

    def wait_until_busy(self) -> None:
        end = time.monotonic() + TIMEOUT_S
        while self.added_mb() < CONTEXT_MB:
            assert time.monotonic() < end, "no process computes on the GPU"
            time.sleep(0.05)

    def assert_clean(self) -> None:
        end = time.monotonic() + CLEAN_S
        while (left := self.strangers()) or self.added_mb() > CONTEXT_MB / 3:
            assert time.monotonic() < end, f"processes {left} and {self.added_mb():.0f} MiB are left on the GPU"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def gpu():
    torch.zeros(1, device="cuda")  # this process takes what it needs before anything is compared
    torch.cuda.synchronize()
    return Gpu()


def words(root: Path) -> tuple[str, ...]:
    """The tiny model on the GPU. Ceilings are measured once, into a file of the test's own."""
    settings = (*(word for word in QUICK if "device" not in word), "measure.device=gpu", "measure.ceilings_s=0.2")
    option = ("graphs._target_=gpu_fault_options.GpuFaulty", f"+graphs.marks={root}/marks")
    return (*settings, *option, f"measure.timeout_s={TIMEOUT_S}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_faults")
    (folder / "marks").mkdir()
    return folder


def ceilings(root: Path) -> dict[str, str]:
    return {"PI0EXP_CEILINGS": str(root / "ceilings.json")}


def test_errors_of_the_gpu_are_outcomes_and_the_next_point_finds_it_clean(root, gpu):
    done = pi0exp(root, *words(root), "-m", f"+graphs.fault={','.join(SWEEP)}", timeout_s=600, **ceilings(root))
    assert done.returncode == 5, done.stderr
    found = {run.data.params["graphs.fault"]: run for run in runs(root)}
    told = {name: (run.data.tags["outcome"], run.data.tags["reasons"]) for name, run in found.items()}
    assert {name: outcome for name, (outcome, _) in told.items()} == {
        name: outcome for name, (outcome, _) in EXPECTED.items()
    }, told
    for name, (_, reason) in EXPECTED.items():
        assert reason in told[name][1]
        assert name == "none" or f"about to {name}" in artifact(root, found[name], "log.txt").read_text()
    assert done.stdout.splitlines()[-1].startswith("study adhoc: 1 of 5 points settled; missing: #0 oom")
    assert processes(root / "pi0exp-") == []
    gpu.assert_clean()


def test_the_same_points_are_measured_once_the_fault_is_gone(root, gpu):
    """Each happens once: the same command now measures what it missed, and all of it is ok."""
    done = pi0exp(root, *words(root), "-m", f"+graphs.fault={','.join(SWEEP)}", timeout_s=600, **ceilings(root))
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == "study adhoc: 5 of 5 points settled, complete"
    assert Counter(run.data.tags["outcome"] for run in runs(root))["ok"] == 5
    gpu.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_killed_command_leaves_nothing_on_the_gpu(tmp_path, root, gpu, number):
    """While a kernel that does not end runs; the next start measures the point."""
    (tmp_path / "marks").mkdir()
    point = (*words(tmp_path), "+graphs.fault=gpu_hang")
    process = start(tmp_path, *point, **ceilings(root))
    end = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "marks" / "gpu_hang").exists():
        assert time.monotonic() < end, "it never hung"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    gpu.wait_until_busy()
    time.sleep(1.0)  # the kernel has begun
    assert processes(tmp_path / "pi0exp-"), "the measuring process runs"
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    gpu.assert_clean()
    end = time.monotonic() + CLEAN_S
    while left := processes(tmp_path / "pi0exp-"):
        assert time.monotonic() < end, left
        time.sleep(0.1)

    again = pi0exp(tmp_path, *point, **ceilings(root))
    assert again.returncode == 0, again
    assert [run.data.tags["outcome"] for run in runs(tmp_path)] == ["interrupted", "ok"]
    gpu.assert_clean()
