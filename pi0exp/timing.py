"""Samples of a call: warm up until the times settle, then measure each call by itself, back to back.

`latency_ms` is what the device needs (events around the call; wall clock on a CPU), inputs on the device.
`latency_host_ms` is what a robot waits for: host arrays in, host array out, by the host's clock.
`latency_paced_ms` is `latency_ms` of calls that begin at fixed times, as a robot's do; the GPU rests in between.

No cache is flushed between calls: each reads gigabytes of weights, far more than any cache holds.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, median, pstdev

import torch

from pi0exp import collection
from pi0exp.config import MeasureConfig
from pi0exp.interval import CONFIDENCE, autocorrelation_time, median_interval
from pi0exp.subject import Progress

Call = Callable[[int], None]
SETTLED = 0.01
"""Warm-up ends when the medians of two successive windows of calls differ by less than this share."""
WINDOW = 10
LOOK_EVERY = 20
"""Samples between two looks at the median's interval. A rule that looks after every sample stops at the luckiest."""
OUTLIER = 1.5
"""A sample is counted, and kept, as an outlier beyond so many times the median."""


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    gc.collect()
    with collection.paused():
        yield


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
    sample: Callable[[int], float],
    count: int,
    max_s: float,
    progress: Progress,
    what: str,
    ci_share: float | None = None,
) -> list[float]:
    """`count` samples, fewer only where `max_s` is over (at least one).

    ci_share: go on beyond `count` until half the confidence interval of the median is within this share of it, or
    `max_s` is over.
    """
    samples, start, shown = list[float](), time.perf_counter(), 0.0

    def enough() -> bool:
        if len(samples) < count:
            return False
        if ci_share is None:
            return True
        if (len(samples) - count) % LOOK_EVERY:
            return False
        interval = median_interval(samples)
        return interval is not None and interval.share <= ci_share

    with quiet():
        while not enough() and (not samples or time.perf_counter() - start < max_s):
            samples.append(sample(len(samples)))
            if (now := time.perf_counter()) - shown > 5:
                progress(f"{what} {len(samples)}/{count}  p50 {median(samples):.3g} ms")
                shown = now
    return samples


def paced_samples(
    sample: Callable[[int], float], count: int, interval_ms: float, max_s: float, progress: Progress
) -> tuple[list[float], float]:
    """Samples of calls that begin every `interval_ms`, and the share of them that began late.

    A call is late where the one before it had not ended, or the host woke up more than 1 ms after the time.
    """
    late, wake_s, start = 0, 1e-3, time.perf_counter()

    def paced(index: int) -> float:
        nonlocal late
        due = start + index * interval_ms / 1e3
        while (rest := due - time.perf_counter()) > 0:
            time.sleep(rest)
        late += -rest > wake_s
        return sample(index)

    samples = measure_samples(paced, count, max_s, progress, f"measure every {interval_ms:g} ms")
    return samples, late / len(samples)


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


def steadiness(samples: list[float]) -> dict[str, float]:
    """How far the samples can be trusted.

    latency_ms/p50_low, p50_high: 95 % confidence interval of the median; latency_ms/p50_ci_share: half of its width
    over the median. The three are missing where the samples are worth too few. sampling/count; sampling/tau: calls that
    are worth one independent sample; sampling/drift_share: median of the last third over that of the first, less 1;
    sampling/outlier_share: samples beyond 1.5 times the median.
    """
    third, middle = max(1, len(samples) // 3), median(samples)
    metrics = {
        "sampling/count": float(len(samples)),
        "sampling/tau": autocorrelation_time(samples),
        "sampling/drift_share": median(samples[-third:]) / median(samples[:third]) - 1,
        "sampling/outlier_share": sum(sample > OUTLIER * middle for sample in samples) / len(samples),
    }
    if (found := median_interval(samples)) is not None:
        names = {"p50_low": found.low, "p50_high": found.high, "p50_ci_share": found.share}
        metrics |= {f"latency_ms/{name}": value for name, value in names.items()}
    return metrics


def doubts(metrics: dict[str, float], config: MeasureConfig) -> dict[str, str]:
    """What a reader must know of the timing: facts, none where the times settled and the interval is as wanted."""
    facts = {}
    if not metrics["warmup/settled"]:
        facts["warm_up"] = f"not settled after {metrics['warmup/calls']:.0f} calls"
    share = metrics.get("latency_ms/p50_ci_share")
    if config.ci_share is not None and (share is None or share > config.ci_share):
        known = "unknown" if share is None else f"known to {100 * share:.2g} %"
        facts["median"] = (
            f"{known} with {100 * CONFIDENCE:.0f} % confidence after {metrics['sampling/count']:.0f} calls,"
            f" {100 * config.ci_share:.2g} % wanted"
        )
    return facts
