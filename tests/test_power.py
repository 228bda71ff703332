"""Energy and power of a pass, from readings that are known, and from a pass on a clock that goes as the test says."""

import threading
import time

import pytest
from gpu_fakes import FakeSensors

from pi0exp import power
from pi0exp.power import Readings, figures, measure_power
from pi0exp.sensors import SensorError

CALL_S = 0.02


def readings(seconds: float = 5.0, watts=lambda t: 500.0, step_s: float | None = 0.1, sampled: bool = True) -> Readings:
    """Every 20 ms from second 100 on; the counter holds what was drawn until its last step."""
    made, drawn, shown, step = Readings(), 1000.0, 1000.0, 0
    for i in range(int(seconds / 0.02)):
        t = i * 0.02
        drawn += watts(t) * 0.02 if i else 0.0
        if step_s is not None and int(t / step_s + 1e-9) > step:
            step, shown = int(t / step_s + 1e-9), drawn
        made.at_s.append(100 + t)
        made.energy_j.append(None if step_s is None else shown)
        made.power_w.append(watts(t) if sampled else None)
    if step_s is None:
        made.why_not["energy"] = "NVML: energy: Not Supported"
    if not sampled:
        made.why_not["power"] = "NVML: power: Not Supported"
    return made


def ends(seconds: float = 5.0) -> list[float]:
    return [100 + CALL_S * i for i in range(int(seconds / CALL_S) + 1)]


def test_counter_and_samples():
    made = figures(ends(), readings(), "momentary")
    assert made.metrics["power_w/mean"] == pytest.approx(500)
    assert made.metrics["power_w/max"] == 500
    assert made.metrics["energy_j/call"] == pytest.approx(500 * CALL_S)
    assert made.metrics["perf_per_watt"] == pytest.approx(1 / CALL_S / 500)
    assert made.metrics["energy_j/uncertainty"] == pytest.approx(0, abs=1e-6)
    assert len(made.samples_w) == 250
    assert made.source.startswith(
        "energy counter, a step every 100 ms; power sampled every 20 ms (momentary); 240 calls"
    )


def test_uncertainty_is_the_difference_of_counter_and_samples():
    """Samples that read 3 % low."""
    made = readings()
    made.power_w[:] = [0.97 * value for value in made.power_w]
    found = figures(ends(), made, "momentary").metrics
    assert found["energy_j/uncertainty"] == pytest.approx(0.03 * 500 * CALL_S)
    assert found["energy_j/call"] == pytest.approx(500 * CALL_S), "the counter's"


def test_changing_power_is_integrated():
    found = figures(ends(), readings(watts=lambda t: 300 + 40 * t, step_s=None), "momentary").metrics
    assert found["power_w/mean"] == pytest.approx(300 + 40 * 2.49, rel=1e-6)
    assert found["power_w/max"] == pytest.approx(300 + 40 * 4.98)


def test_missing_counter_leaves_the_samples():
    made = figures(ends(), readings(step_s=None), "mean of a second")
    assert made.metrics["energy_j/call"] == pytest.approx(500 * CALL_S)
    assert "energy_j/uncertainty" not in made.metrics
    assert "(mean of a second); no energy counter: NVML: energy: Not Supported" in made.source


def test_missing_samples_leave_the_counter():
    made = figures(ends(), readings(sampled=False), "momentary")
    assert made.metrics["energy_j/call"] == pytest.approx(500 * CALL_S)
    assert {"power_w/max", "energy_j/uncertainty"} & set(made.metrics) == set()
    assert "no power: NVML: power: Not Supported" in made.source


def test_nothing_known_is_no_zero():
    made = figures(ends(), readings(step_s=None, sampled=False), "momentary")
    assert made.metrics == {}
    assert made.source == "absent: NVML: energy: Not Supported; NVML: power: Not Supported"


def test_counter_that_answers_now_and_then_is_none():
    made = readings()
    made.energy_j[7], made.why_not["energy"] = None, "NVML: energy: Unknown Error"
    assert "no energy counter: NVML: energy: Unknown Error" in figures(ends(), made, "momentary").source


def test_counter_that_stands_still_or_goes_backwards_is_none():
    still = readings(step_s=100.0)
    assert "no energy counter: the energy counter made 0 steps in 5.0 s" in figures(ends(), still, "m").source
    backwards = readings()
    backwards.energy_j[120:] = [value - 500 for value in backwards.energy_j[120:]]
    assert "went backwards" in figures(ends(), backwards, "m").source


def test_counter_with_few_steps_is_none():
    """Between the first step and the last lies less than half of the pass."""
    assert "made 2 steps" in figures(ends(), readings(step_s=1.9), "m").source
    assert figures(ends(), readings(step_s=1.2), "m").source.startswith("energy counter, a step every 1200 ms")


def test_window_without_a_call():
    made = figures([100.0, 160.0], readings(), "momentary")
    assert made.metrics == {}
    assert "no call ended" in made.source


def test_calls_are_counted_by_the_window(monkeypatch: pytest.MonkeyPatch):
    """Slow calls before and after the counter's steps do not count."""
    made = figures([100 + 0.5 * i for i in range(11)], readings(), "momentary")
    window = 4.9 - 0.1
    assert made.metrics["energy_j/call"] == pytest.approx(500 * window / (window / 0.5))


def test_pass_on_the_real_clock(monkeypatch: pytest.MonkeyPatch):
    """Half a second of calls of 10 ms, at 400 W; the lead is skipped, the thread ends."""
    monkeypatch.setattr(power, "LEAD_S", 0.05)
    seen: list[int] = []

    def call(index: int) -> None:
        seen.append(index)
        time.sleep(0.01)

    before = threading.active_count()
    made = measure_power(call, FakeSensors(time.perf_counter, watts=400.0, step_s=0.05), 0.5)
    assert threading.active_count() == before
    assert made.metrics["power_w/max"] == 400
    # An edge is known to one interval between readings; on a busy machine some come late.
    assert made.metrics["power_w/mean"] == pytest.approx(400, rel=0.3)
    assert len(seen) == len(set(seen)), "the inputs rotate on"
    assert (made.sm_mhz, made.held) == (1755.0, "power cap 100 %")


def test_clocks_under_load_are_told_with_their_reasons():
    assert power.held([["power cap"], ["power cap", "thermal"], [], ["power cap"]]) == "power cap 75 %, thermal 25 %"
    assert power.held([[], []]) == ""
    assert power.held([]) is None
    made = Readings()
    silent = FakeSensors(time.perf_counter, clocks_mhz="no clock", throttle="no reasons")
    for _ in range(power.CLOCK_EVERY + 1):
        power.read(silent, made)
    assert (made.sm_mhz, made.throttle) == ([], [])
    assert made.why_not == {"clock": "no clock", "throttle": "no reasons"}


def test_interval_of_the_samples_is_what_was_reached():
    made = readings()
    made.at_s[:] = [100 + 2.5 * (at_s - 100) for at_s in made.at_s]
    assert "power sampled every 50 ms" in figures(ends(), made, "momentary").source


def test_failure_of_a_reading_reaches_the_caller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(power, "LEAD_S", 0.0)
    sensors = FakeSensors(time.perf_counter)
    monkeypatch.setattr(sensors, "power_w", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_power(lambda index: time.sleep(0.01), sensors, 0.2)


def test_missing_sensors_are_told_once():
    made = Readings()
    sensors = FakeSensors(time.perf_counter, energy_j="no counter", power_w="no power")
    for _ in range(3):
        power.read(sensors, made)
    assert made.why_not == {"energy": "no counter", "power": "no power"}
    assert (made.sm_mhz, made.throttle) == ([1755.0], [["power cap"]]), "a look at the clock every five readings"
    assert made.energy_j == made.power_w == [None] * 3
    with pytest.raises(SensorError):
        sensors.energy_j()
