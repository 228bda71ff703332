"""The child on a machine that pretends to have a GPU: ceilings, floors, sensors and the plot come together."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpu_fakes import FakeSensors
from toy_subjects import Toy

from pi0exp import ceilings, gpu_time, measure, passes, power, subject
from pi0exp.ceilings import Reached
from pi0exp.machine import Machine
from pi0exp.result import Outcome
from pi0exp.roofline import Ceilings, Rooflines
from pi0exp.subject import StageWork

H200 = Machine("NVIDIA H200", "nvidia", "sm_90", 143771, "580.1", versions={"torch": torch.__version__})
PLAIN = {
    "subject": {"_target_": "toy_subjects.Toy"},
    "measure": {
        "samples": 5,
        "host_samples": 1,
        "warmup_calls": 1,
        "warmup_s": 0.0,
        "warmup_max_s": 0.0,
        "power_s": 0.0,
    },
}


@dataclass
class Counted(Toy):
    """A toy with a known amount of work: 2 ms of a machine that makes 1 TFLOP/s. A call takes 1 ms or more."""

    def work(self) -> list[StageWork]:
        return [StageWork("vision", 1e6, 1e3), StageWork("denoise", 1e5, 1e3, count=10)]

    def stack_work(self) -> list[StageWork]:
        return [StageWork("vision", 3e6, 1e3), StageWork("denoise", 1e5, 1e3, count=10)]

    def matrix_rate(self) -> str:
        return "bf16"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A GPU that is pretended, and for each time that its ceilings were asked for whether they might be reused."""
    times: list[bool] = []
    monkeypatch.setattr(measure, "target_machine", lambda wanted: (H200, []))
    monkeypatch.setattr(subject, "subject", lambda plain: Counted("none"))
    for name, value in {"is_available": True, "empty_cache": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**21)
    monkeypatch.setattr(gpu_time, "gpu_time", lambda *given: gpu_time.GpuTime(set(), None))
    monkeypatch.setattr(ceilings, "owner_of", lambda machine, device: {})
    monkeypatch.setattr(passes, "device_sample_ms", lambda call, index, device: sample(call, index))
    monkeypatch.setattr(passes, "warm_up", lambda *given: {"warmup/calls": 1.0, "warmup/settled": 1.0})
    monkeypatch.setattr(passes, "open_sensors", lambda device: FakeSensors(time.perf_counter, step_s=0.03))
    monkeypatch.setattr(power, "LEAD_S", 0.0)
    whole = passes.measure_power
    monkeypatch.setattr(passes, "measure_power", lambda call, given, seconds: whole(call, given, seconds / 10))
    return times


def sample(call: Any, index: int) -> float:
    call(index)
    return 4.0


@pytest.mark.parametrize(
    "words",
    [
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "The NVIDIA driver on your system is too old (found version 11040).\nUpdate your GPU driver",
    ],
)
def test_gpu_that_cannot_be_opened_is_measured_again(monkeypatch: pytest.MonkeyPatch, words: str):
    def refuse() -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(measure, "target_machine", lambda wanted: (H200, []))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    made = measure.guarded(PLAIN)
    assert made.outcome is Outcome.ERROR
    assert not made.outcome.settled
    there = f"there is a NVIDIA H200, but torch {torch.__version__} cannot use it (driver 580.1): "
    assert made.reasons == [there + words.replace("\n", " ")]
    assert (made.numerics, made.fingerprint["gpu"]) == ("REORDERED", "NVIDIA H200")


def reaching(patch: pytest.MonkeyPatch, asked: list[bool], first: float, later: float) -> None:
    """Ceilings of so many FLOP/s: kept ones, and those that are measured when nothing may be reused."""

    def reached(rate: str, device: Any, seconds: float, reuse: bool, *given: Any) -> Reached:
        assert rate == "bf16"
        asked.append(reuse)
        flops = first if reuse else later
        roofs = Rooflines(Ceilings(1e15, flops), Ceilings(1e15, 0.8 * flops))
        return Reached(roofs, "of yesterday" if reuse else "measured in this run", reuse)

    patch.setattr(ceilings, "reached", reached)


def test_floors_shares_power_and_plot_are_in_the_result(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    reaching(monkeypatch, asked, 1e9, 1e9)
    made = measure.measure(PLAIN | {"measure": PLAIN["measure"] | {"power_s": 5.0}})
    assert made.outcome is Outcome.OK, made.reasons
    found = made.metrics
    assert found["roofline/floor_ms"] == pytest.approx(2)
    assert found["roofline/floor_sustained_ms"] == pytest.approx(2.5)
    assert found["roofline/stack_floor_ms"] == pytest.approx(4)
    assert found["roofline/share"] == pytest.approx(0.5)
    assert found["roofline/share_sustained"] == pytest.approx(0.625)
    assert found["ceilings/matrix_tflop_per_s"] == pytest.approx(1e-3)
    assert {"power_w/mean", "energy_j/call", "clock_mhz/sm_before", "memory_mb/peak"} <= set(found)
    assert made.facts["ceilings"] == "of yesterday"
    assert made.facts["clocks"] == "held down: power cap"
    assert made.facts["toy"] == "yes"
    assert "call 50 %" in made.files["roofline.svg"]
    assert asked == [True]


def test_thorough_run_reuses_no_ceilings(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    reaching(monkeypatch, asked, 1e9, 1e9)
    made = measure.measure(PLAIN | {"measure": PLAIN["measure"] | {"reuse_ceilings": False}})
    assert asked == [False]
    assert made.facts["ceilings"] == "measured in this run"
    assert "power" not in made.facts


def test_below_kept_ceilings_they_are_measured_again(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    """Kept ones may have been disturbed; a call below those of the same run is an error."""
    reaching(monkeypatch, asked, 1e8, 1e9)
    made = measure.measure(PLAIN)
    assert asked == [True, False]
    assert made.outcome is Outcome.OK
    assert made.metrics["roofline/floor_ms"] == pytest.approx(2)
    assert made.facts["ceilings"] == "measured in this run"


def test_below_the_burst_floor_is_an_error(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    reaching(monkeypatch, asked, 1e8, 1e8)
    made = measure.measure(PLAIN)
    assert made.outcome is Outcome.ERROR
    assert "is below the floor of 20.000 ms" in made.reasons[0]
    assert made.metrics["roofline/floor_ms"] == pytest.approx(20)


def test_paced_calls_below_the_floor_are_an_error_too(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    """The floor is 3.3 ms; a call takes 4 ms back to back, and 1 ms at a pace that nobody could reach."""
    reaching(monkeypatch, asked, 6e8, 6e8)
    monkeypatch.setattr(passes, "paced_samples", lambda *given: ([1.0] * 5, 0.0))
    made = measure.measure(PLAIN | {"measure": PLAIN["measure"] | {"paced_interval_ms": 5.0}})
    assert made.outcome is Outcome.ERROR
    assert "latency 1.000 ms is below the floor of 3.333 ms" in made.reasons[0]


def test_below_the_sustained_floor_is_none(monkeypatch: pytest.MonkeyPatch, asked: list[bool]):
    reaching(monkeypatch, asked, 5.5e8, 5.5e8)
    made = measure.measure(PLAIN)
    assert made.outcome is Outcome.OK
    assert made.metrics["roofline/floor_ms"] < 4 < made.metrics["roofline/floor_sustained_ms"]
    assert made.metrics["roofline/share_sustained"] > 1
