"""Where a call spends its time, stage by stage: marks of the device before and after each function of a stage.

Only where a stack calls these functions from Python. In one graph for the whole call there is nothing to mark; there
the stages are told apart by the kernels of a profile, and this pass measures nothing.

The marks stand in the stream, so a stage's time contains the gaps in which the device waits for the host. What lies
between the functions is `other`: adding the velocity, copying inputs and outputs.
"""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch

from pi0exp.subject import Instance, Progress
from pi0exp.timing import quiet


class Mark(Protocol):
    """A moment of the device."""

    def ms_until(self, later: Any) -> float: ...


class EventMark:
    """In the current stream; readable once the device has passed the later of two."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def ms_until(self, later: "EventMark") -> float:
        elapsed_ms: float = self.event.elapsed_time(later.event)
        return elapsed_ms


class ClockMark:
    """By the host's clock, for a CPU that is done when a function returns."""

    def __init__(self) -> None:
        self.at_s = time.perf_counter()

    def ms_until(self, later: "ClockMark") -> float:
        return 1e3 * (later.at_s - self.at_s)


def stage_samples(
    instance: Instance, device: torch.device, count: int, max_s: float, progress: Progress
) -> dict[str, list[float]]:
    """Stage -> milliseconds of every call, `other` among them; empty where the stages are not apart.

    At least one call; fewer than `count` only where `max_s` is over.
    """
    mark: Callable[[], Mark] = EventMark if device.type == "cuda" else ClockMark
    passed: list[tuple[str, Mark, Mark]] = []

    def watch(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **named: Any) -> Any:
            before = mark()
            result = function(*args, **named)
            passed.append((stage, before, mark()))
            return result

        return marked

    watching = instance.watched(watch)
    if watching is None:
        return {}
    progress("measure stages")
    samples: list[Counter[str]] = []
    with watching, quiet():
        instance.call(0)
        synchronize(device)
        end = time.perf_counter() + max_s
        while not samples or (len(samples) < count and time.perf_counter() < end):
            passed.clear()
            before = mark()
            instance.call(len(samples))
            after = mark()
            synchronize(device)
            times: Counter[str] = Counter()
            for stage, first, last in passed:
                times[stage] += first.ms_until(last)  # type: ignore[assignment]
            times["other"] = before.ms_until(after) - sum(times.values())  # type: ignore[assignment]
            samples.append(times)
    return {stage: [times[stage] for times in samples] for stage in samples[0]}


def stage_metrics(samples: dict[str, list[float]]) -> dict[str, float]:
    """stage_ms/NAME: the median of each."""
    return {f"stage_ms/{stage}": median(times) for stage, times in samples.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
