"""The passes together, on a CPU with sensors that are played."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from gpu_fakes import FakeSensors
from toy_subjects import ToyInstance

from pi0exp import passes, power
from pi0exp.config import MeasureConfig
from pi0exp.passes import State, gpu_sensors, state, strangers, timed_passes, told
from pi0exp.result import TIMED, Outcome, Result
from pi0exp.sensors import SensorError
from pi0exp.subject import Verdict

CPU = torch.device("cpu")
SHORT = {"warmup_calls": 1, "warmup_s": 0.0, "warmup_max_s": 0.0, "samples": 10, "host_samples": 1, "ci_share": None}
ALL = {"paced_interval_ms": 2.0, "paced_samples": 4, "power_s": 5.0}


def ignore(text: str) -> None:
    pass


def run(monkeypatch: pytest.MonkeyPatch, sensors: FakeSensors | None, **settings):
    """All passes of a toy; the power pass takes half a second instead of its five."""
    monkeypatch.setattr(power, "LEAD_S", 0.0)
    whole = passes.measure_power
    monkeypatch.setattr(passes, "measure_power", lambda call, given, seconds: whole(call, given, seconds / 10))
    return timed_passes(ToyInstance(Verdict()), CPU, MeasureConfig(**SHORT | ALL | settings), ignore, sensors)


def test_every_pass_leaves_its_metrics_and_samples(monkeypatch: pytest.MonkeyPatch):
    made = run(monkeypatch, FakeSensors(time.perf_counter, step_s=0.03))
    assert len(made.samples["latency_ms"]) == 10
    assert set(made.samples) == {"latency_ms", "latency_host_ms", "latency_paced_ms", "power_w"}
    wanted = {
        "latency_ms/p50",
        "latency_host_ms/p50",
        "latency_paced_ms/p50",
        "latency_paced_ms/p99",
    }
    wanted |= {"power_w/mean", "power_w/max", "power_w/limit", "energy_j/call", "energy_j/uncertainty", "perf_per_watt"}
    assert wanted <= set(made.timed)
    assert all(name.startswith(TIMED) for name in made.timed), "none of it belongs to a run that failed"
    assert not any(name.startswith(TIMED) for name in made.metrics)
    assert {"clock_mhz/sm_before", "clock_mhz/memory_after", "temperature_c/gpu_after", "warmup/calls"} <= set(
        made.metrics
    )
    assert made.facts["clocks"] == "held down: power cap"
    assert made.facts["power"].startswith("energy counter, a step every")
    assert made.metrics["clock_mhz/sm_loaded"] == 1755
    assert made.facts["clocks_loaded"] == "held down: power cap 100 % of the power pass"
    assert Result(Outcome.OK, metrics=made.metrics | made.timed, samples=made.samples, facts=made.facts)


def test_passes_that_are_off_leave_nothing(monkeypatch: pytest.MonkeyPatch):
    made = run(monkeypatch, FakeSensors(time.perf_counter), paced_interval_ms=None, power_s=0.0)
    assert set(made.samples) == {"latency_ms", "latency_host_ms"}
    assert not any(name.startswith(("latency_paced_ms", "power_w", "energy_j")) for name in made.timed)
    assert "power" not in made.facts


def test_cpu_has_no_sensors(monkeypatch: pytest.MonkeyPatch):
    made = run(monkeypatch, None)
    assert not any(name.startswith(("clock_mhz", "power_w", "temperature_c")) for name in made.metrics | made.timed)
    assert gpu_sensors(CPU) == (None, {})


def test_gpu_without_sensors_says_why(monkeypatch: pytest.MonkeyPatch):
    def refuse(device):
        raise SensorError("AMD SMI cannot be imported: no libamd_smi.so")

    monkeypatch.setattr(passes, "open_sensors", refuse)
    sensors, facts = gpu_sensors(torch.device("cuda", 0))
    assert sensors is None
    assert facts == {"power": "absent: AMD SMI cannot be imported: no libamd_smi.so"}


# ---- the state of the GPU


def test_state_is_what_can_be_told():
    everything = state(FakeSensors(time.perf_counter))
    assert everything.numbers == {"clock_mhz/sm": 1755, "clock_mhz/memory": 3201, "temperature_c/gpu": 55}
    silent = dict.fromkeys(("clocks_mhz", "temperature_c", "throttle", "processes"), "no")
    assert state(FakeSensors(time.perf_counter, **silent)) == State({}, None, {})
    assert state(FakeSensors(time.perf_counter, throttle="no")).numbers == everything.numbers


def test_clocks_are_told_before_and_after():
    before, after = (
        State({"clock_mhz/sm": 1980.0}, [], {}),
        State({"clock_mhz/sm": 1400.0}, ["power cap", "thermal"], {}),
    )
    metrics, facts = told(before, after)
    assert metrics == {"clock_mhz/sm_before": 1980, "clock_mhz/sm_after": 1400}
    assert facts == {"clocks": "held down: power cap, thermal"}
    assert told(before, before)[1] == {}
    assert "does not tell" in told(State({}, None, {}), State({}, None, {}))[1]["clocks"]


def test_other_processes_are_told():
    own = {os.getpid(): "5000 MiB"}
    assert strangers({}) == strangers(own) == ""
    assert strangers(own | {7: "9 MiB"}) == "7 (9 MiB)"
    assert strangers({4711: "5000 MiB"}) == "", "this process by its number on the host"
    assert strangers({4711: "5000 MiB", 4712: "9 MiB"}) == "4711 (5000 MiB); 4712 (9 MiB); one of them is this one"
    before, after = State({}, [], own), State({}, [], own | {8: "9 MiB"})
    assert told(before, after)[1] == {"processes": "8 (9 MiB)"}


def test_state_is_read_around_the_calls_not_among_them(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    sensors = FakeSensors(time.perf_counter)
    monkeypatch.setattr(passes, "state", lambda given: order.append("state") or State({}, [], {}))
    instance = SimpleNamespace(
        call=lambda index: order.append("call"),
        call_host=lambda index: order.append("host"),
        watched=lambda watch: None,
    )
    settings = MeasureConfig(**SHORT | {"power_s": 0.0})
    timed_passes(instance, CPU, settings, ignore, sensors)
    assert order == ["call", "state", *["call"] * 10, "state", "host"]
