"""Samples of a call: warm up until the times settle, then measure each call by itself, back to back.

`latency_ms` is what the device needs (events around the call; wall clock on a CPU), inputs on the device.
`latency_host_ms` is what a robot waits for: host arrays in, host array out, by the host's clock.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, median, pstdev

import torch

from pi0exp.config import MeasureConfig
from pi0exp.subject import Progress

Call = Callable[[int], None]
SETTLED = 0.01
"""Warm-up ends when the medians of two successive windows of calls differ by less than this share."""
WINDOW = 10


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def device_sample_ms(call: Call, index: int, device: torch.device) -> float:
    """Milliseconds of one call, by device events where there are any."""
    if device.type != "cuda":
        return wall_sample_ms(call, index)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(index)
    stop.record()
    stop.synchronize()
    elapsed_ms: float = start.elapsed_time(stop)
    return elapsed_ms


def wall_sample_ms(call: Call, index: int) -> float:
    """Milliseconds of one call that returns when it is done."""
    start = time.perf_counter()
    call(index)
    return (time.perf_counter() - start) * 1e3


def warm_up(call: Call, device: torch.device, config: MeasureConfig) -> dict[str, float]:
    """Call until the medians of two windows agree, for at least the configured calls and seconds.

    Metrics: `warmup/calls`, and `warmup/settled` 1 or 0 when the time limit came first.
    """
    start, times = time.perf_counter(), list[float]()
    while True:
        times.append(device_sample_ms(call, len(times), device))
        elapsed = time.perf_counter() - start
        last, before = times[-WINDOW:], times[-2 * WINDOW : -WINDOW]
        settled = len(before) == WINDOW and abs(median(last) / median(before) - 1) < SETTLED
        enough = len(times) >= config.warmup_calls and elapsed >= config.warmup_s
        if (settled and enough) or (elapsed >= config.warmup_max_s and len(times) >= config.warmup_calls):
            return {"warmup/calls": float(len(times)), "warmup/settled": float(settled)}


def measure_samples(
    sample: Callable[[int], float], count: int, max_s: float, progress: Progress, what: str
) -> list[float]:
    """`count` samples, fewer only where `max_s` is over (at least one)."""
    samples, start, shown = list[float](), time.perf_counter(), 0.0
    with quiet():
        while len(samples) < count and (not samples or time.perf_counter() - start < max_s):
            samples.append(sample(len(samples)))
            if (now := time.perf_counter()) - shown > 5:
                progress(f"{what} {len(samples)}/{count}  p50 {median(samples):.3g} ms")
                shown = now
    return samples


def percentile(samples: list[float], percent: float) -> float:
    """By linear interpolation between the two nearest samples."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: list[float]) -> dict[str, float]:
    """`latency_ms/...` of the samples."""
    numbers = {f"p{percent}": percentile(samples, percent) for percent in (50, 10, 90, 99)}
    return {
        f"latency_ms/{name}": value
        for name, value in {**numbers, "mean": fmean(samples), "std": pstdev(samples)}.items()
    }
