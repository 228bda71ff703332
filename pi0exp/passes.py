"""The passes in which a verified subject is timed, one after the other; each has the device for itself.

Warm-up, calls back to back, host to host, at a robot's pace, stage by stage, power. What the GPU says of its clocks
and of other processes is read before and after the calls back to back, never among them.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import torch

from pi0exp.config import MeasureConfig
from pi0exp.power import measure_power
from pi0exp.sensors import SensorError, Sensors, open_sensors
from pi0exp.stages import stage_metrics, stage_samples
from pi0exp.subject import Instance, Progress
from pi0exp.timing import (
    device_sample_ms,
    doubts,
    measure_samples,
    paced_samples,
    percentile,
    steadiness,
    summary,
    wall_sample_ms,
    warm_up,
)

T = TypeVar("T")


@dataclass
class Passes:
    """metrics: of any run. timed: only of a correct and proven one. samples: every one. facts: what to know of them."""

    metrics: dict[str, float] = field(default_factory=dict)
    timed: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A GPU at one moment, as far as it tells: numbers by name, why its clocks are held down, process id -> words."""

    numbers: dict[str, float]
    throttle: list[str] | None
    processes: dict[int, str]


def state(sensors: Sensors) -> State:
    def ask(question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        except SensorError:
            return otherwise

    nothing: dict[str, float] = {}
    numbers = {f"clock_mhz/{name}": value for name, value in ask(sensors.clocks_mhz, nothing).items()}
    numbers |= ask(lambda: {"temperature_c/gpu": sensors.temperature_c()}, nothing)
    return State(numbers, ask(sensors.throttle, None), ask(sensors.processes, {}))


def told(before: State, after: State) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics clock_mhz/sm_before and alike; facts `clocks` (why they were held down) and `processes` (of others)."""
    moments = (("before", before), ("after", after))
    metrics = {f"{name}_{when}": value for when, at in moments for name, value in at.numbers.items()}
    facts = {}
    reasons = [reason for at in (before, after) for reason in at.throttle or []]
    if reasons:
        facts["clocks"] = f"held down: {', '.join(dict.fromkeys(reasons))}"
    elif before.throttle is None and after.throttle is None:
        facts["clocks"] = "the GPU does not tell whether they were held down"
    if others := strangers(before.processes | after.processes):
        facts["processes"] = others
    return metrics, facts


def strangers(processes: dict[int, str]) -> str:
    """The processes that are not this one, in words.

    In a container the ids may be those of the host, and this process one of them under a number that it does not know:
    a single process is then taken for this one, and of several it is said that one of them is.
    """
    others = {pid: words for pid, words in processes.items() if pid != os.getpid()}
    if len(processes) == 1:
        others = {}
    names = "; ".join(f"{pid} ({words})" for pid, words in others.items())
    return f"{names}; one of them is this one" if names and os.getpid() not in processes else names


def timed_passes(
    instance: Instance, device: torch.device, settings: MeasureConfig, progress: Progress, sensors: Sensors | None
) -> Passes:
    """All passes. sensors: of the GPU; None on a CPU, and where they cannot be opened."""
    made = Passes()

    def sample(index: int) -> float:
        return device_sample_ms(instance.call, index, device)

    progress("warm up")
    made.metrics |= warm_up(instance.call, device, settings)
    before = None if sensors is None else state(sensors)
    limit_s = settings.samples_max_s
    samples = measure_samples(sample, settings.samples, limit_s, progress, "measure", settings.ci_share)
    if sensors is not None and before is not None:
        metrics, facts = told(before, state(sensors))
        made.metrics |= metrics
        made.facts |= facts
    made.samples["latency_ms"] = samples
    made.timed |= summary(samples) | steadiness(samples)
    made.facts |= doubts(made.metrics | made.timed, settings)

    host = measure_samples(
        lambda i: wall_sample_ms(instance.call_host, i),
        settings.host_samples,
        limit_s,
        progress,
        "measure host to host",
    )
    made.samples["latency_host_ms"] = host
    made.timed["latency_host_ms/p50"] = median(host)

    if (interval_ms := settings.paced_interval_ms) is not None:
        paced, late_share = paced_samples(sample, settings.paced_samples, interval_ms, limit_s, progress)
        made.samples["latency_paced_ms"] = paced
        made.timed |= {f"latency_paced_ms/p{percent}": percentile(paced, percent) for percent in (50, 99)}
        made.timed["latency_paced_ms/late_share"] = late_share

    if sensors is not None and settings.power_s:
        progress("measure power")
        power = measure_power(sample, sensors, settings.power_s)
        made.timed |= power.metrics
        made.samples |= {"power_w": power.samples_w} if power.samples_w else {}
        made.facts["power"] = power.source
        if power.sm_mhz is not None:
            made.metrics["clock_mhz/sm_loaded"] = power.sm_mhz
        if power.held:
            made.facts["clocks_loaded"] = f"held down: {power.held} of the power pass"
        with suppress(SensorError):
            made.timed["power_w/limit"] = sensors.power_limit_w()

    # Last: it exchanges functions of the model, and everything above ran what is served.
    stages = stage_samples(instance, device, settings.stage_samples, limit_s, progress)
    made.samples |= {f"stage_ms/{stage}": times for stage, times in stages.items()}
    made.timed |= stage_metrics(stages)
    return made


def gpu_sensors(device: torch.device) -> tuple[Sensors | None, dict[str, str]]:
    """The sensors of a GPU; where it has none that can be read, the reason as a fact."""
    if device.type != "cuda":
        return None, {}
    try:
        return open_sensors(device), {}
    except SensorError as error:
        return None, {"power": f"absent: {error}"}
