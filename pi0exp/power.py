"""Power and energy of calls back to back, in a pass of its own: nothing else is measured meanwhile.

A thread reads the GPU's energy counter and its power every 20 ms while calls follow each other. The counter moves in
steps of some tens of milliseconds, so the window begins and ends at a step; the calls within it are counted by the
times at which they ended. Where both exist, the power samples are integrated over the same window, and the difference
of the two energies is the uncertainty of the figure. Where only power exists, the energy is that integral.

Now and then it also looks at the clock and at why it is held down: this is the longest load of a measurement.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import TypeVar

import numpy as np

from pi0exp.sensors import SensorError, Sensors

T = TypeVar("T")
INTERVAL_S = 0.02
CLOCK_EVERY = 5
"""Readings between two looks at the clock, which take time that the counter's steps would be known less well by."""
LEAD_S = 1.5
"""Calls before the window, so that a sensor that shows the mean of a second has forgotten what was before them."""
SPAN = 0.5
"""Share of the pass that the counter's steps must span. Each end of the window is known to one interval between
readings: with half of 5 s, to 0.8 % of the energy."""


@dataclass(frozen=True)
class Readings:
    """What the sensors said during the pass. at_s: host clock; energy_j, power_w: None where there was no answer.

    sm_mhz: the clock at each look, throttle: why it was held down; both without the looks that had no answer.
    why_not: "energy", "power", "clock" or "throttle" -> why it was missing at its first reading.
    """

    at_s: list[float] = field(default_factory=list)
    energy_j: list[float | None] = field(default_factory=list)
    power_w: list[float | None] = field(default_factory=list)
    sm_mhz: list[float] = field(default_factory=list)
    throttle: list[list[str]] = field(default_factory=list)
    why_not: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Power:
    """Metrics of the pass, every power sample in W, and in words how they were got or why there are none.

    sm_mhz: median clock of the multiprocessors; held: why it was held down and in which share of the looks, "" where it
    was not. None where the GPU does not tell.
    """

    metrics: dict[str, float]
    samples_w: list[float]
    source: str
    sm_mhz: float | None = None
    held: str | None = None


def read(sensors: Sensors, readings: Readings) -> None:
    """One reading of energy and power, appended; of the clock every `CLOCK_EVERY` times."""
    at_s = time.perf_counter()

    def ask(name: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except SensorError as error:
            readings.why_not.setdefault(name, str(error))
            return None

    energy_j, power_w = ask("energy", sensors.energy_j), ask("power", sensors.power_w)
    if len(readings.at_s) % CLOCK_EVERY == 0:
        if (clocks := ask("clock", sensors.clocks_mhz)) is not None:
            readings.sm_mhz.append(clocks["sm"])
        if (reasons := ask("throttle", sensors.throttle)) is not None:
            readings.throttle.append(reasons)
    readings.at_s.append(at_s)
    readings.energy_j.append(energy_j)
    readings.power_w.append(power_w)


def measure_power(call: Callable[[int], object], sensors: Sensors, seconds: float) -> Power:
    """Calls back to back for `seconds`, after a lead of 1.5 s. call: makes one and waits until it is done."""
    readings, stop, failures = Readings(), threading.Event(), list[BaseException]()

    def follow() -> None:
        try:
            while not stop.wait(INTERVAL_S):
                read(sensors, readings)
        except BaseException as error:  # told to the caller, not to a thread that nobody listens to
            failures.append(error)

    count, end = 0, time.perf_counter() + LEAD_S
    while time.perf_counter() < end:
        call(count)
        count += 1
    ends_s = [time.perf_counter()]
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        while ends_s[-1] - ends_s[0] < seconds:
            call(count + len(ends_s))
            ends_s.append(time.perf_counter())
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    found = figures(ends_s, readings, sensors.power_kind)
    return replace(found, sm_mhz=median(readings.sm_mhz) if readings.sm_mhz else None, held=held(readings.throttle))


def held(throttle: list[list[str]]) -> str | None:
    """Each reason with the share of the looks that met it, the most frequent first; None where there was no look."""
    counts = Counter(reason for reasons in throttle for reason in reasons)
    named = [f"{reason} {100 * count / len(throttle):.0f} %" for reason, count in counts.most_common()]
    return ", ".join(named) if throttle else None


def figures(ends_s: list[float], readings: Readings, power_kind: str) -> Power:
    """What the readings mean. ends_s: when the pass began, then when each call ended.

    power_w/mean, power_w/max (of the samples), energy_j/call, perf_per_watt (calls per second per watt, which is calls
    per joule), energy_j/uncertainty (J a call) where counter and samples both exist.
    """
    at_s, power = _known(readings, readings.power_w)
    window, why = _counter_window(readings)
    inside = f"power sampled every {1e3 * _interval_s(at_s):.0f} ms ({power_kind})"
    if window is None:
        if len(power) < 2:
            return Power({}, power, f"absent: {why}; {readings.why_not.get('power', 'no power was read')}")
        begin_s, end_s, source = at_s[0], at_s[-1], f"{inside}; no energy counter: {why}"
        energy_j = _integral_j(at_s, power, begin_s, end_s)
    else:
        begin_s, end_s, energy_j, step_s = window
        source = f"energy counter, a step every {1e3 * step_s:.0f} ms"
    calls = float(np.interp(end_s, ends_s, range(len(ends_s))) - np.interp(begin_s, ends_s, range(len(ends_s))))
    if calls < 1:
        return Power({}, power, f"absent: no call ended within the window of {end_s - begin_s:.1f} s")
    metrics = {
        "power_w/mean": energy_j / (end_s - begin_s),
        "energy_j/call": energy_j / calls,
        "perf_per_watt": calls / energy_j,
    }
    if power:
        metrics["power_w/max"] = max(power)
    if window is not None and len(power) >= 2:
        sampled_j = _integral_j(at_s, power, begin_s, end_s)
        metrics["energy_j/uncertainty"] = abs(energy_j - sampled_j) / calls
        source += f"; {inside}"
    elif window is not None:
        source += f"; no power: {readings.why_not.get('power', 'it was not read')}"
    return Power(metrics, power, f"{source}; {calls:.0f} calls in {end_s - begin_s:.1f} s")


def _interval_s(at_s: list[float]) -> float:
    """Between two readings, in the median: what was reached, whatever was meant."""
    return median(b - a for a, b in pairwise(at_s)) if len(at_s) > 1 else INTERVAL_S


def _known(readings: Readings, values: list[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(at_s, value) for at_s, value in zip(readings.at_s, values, strict=True) if value is not None]
    return [at_s for at_s, _ in pairs], [value for _, value in pairs]


def _counter_window(readings: Readings) -> tuple[tuple[float, float, float, float] | None, str]:
    """(begin, end, joules between, median seconds of a step) from the first step of the counter to its last."""
    at_s, energy_j = _known(readings, readings.energy_j)
    if "energy" in readings.why_not:  # also where it answers now and then: such a counter is no measure
        return None, readings.why_not["energy"]
    if not energy_j:
        return None, "the energy counter was not read"
    steps = [i for i in range(1, len(energy_j)) if energy_j[i] != energy_j[i - 1]]
    if any(energy_j[i] < energy_j[i - 1] for i in steps):
        return None, "the energy counter went backwards"
    if len(steps) < 2 or at_s[steps[-1]] - at_s[steps[0]] < SPAN * (at_s[-1] - at_s[0]):
        return None, f"the energy counter made {len(steps)} steps in {at_s[-1] - at_s[0]:.1f} s"
    gaps = [at_s[b] - at_s[a] for a, b in pairwise(steps)]
    first, last = steps[0], steps[-1]
    return (at_s[first], at_s[last], energy_j[last] - energy_j[first], median(gaps)), ""


def _integral_j(at_s: list[float], power_w: list[float], begin_s: float, end_s: float) -> float:
    """Of the straight lines between the samples, from begin to end."""
    times = np.array([begin_s, *(t for t in at_s if begin_s < t < end_s), end_s])
    values = np.interp(times, at_s, power_w)
    return float((np.diff(times) * (values[1:] + values[:-1]) / 2).sum())
