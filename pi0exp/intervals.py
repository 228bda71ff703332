"""How sure a ratio is: intervals for three kinds of evidence, and the word that follows from one.

Ratios are B / A throughout. The unit that may vary by chance is what was repeated: a round of blocks of two stacks that
take turns in one process, a process, or the samples of one process. Successive samples resemble each other, so single
samples are never the unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Any]
"""Of the last axis: [..., samples] -> [...]."""

CONFIDENCE = 0.99
"""Of all intervals. One comparison in a hundred of a stack with itself may find something."""
MARGIN = 0.005
"""Smaller differences are not called faster or slower: two builds of one stack differ too, in the addresses of their
memory, say. `experiments/resolution.py` measures by how much."""
PROCESSES = 3
"""Processes a side below which nothing is claimed across processes: their spread is not known."""
ROUNDS = 10
"""Rounds below which no interval is given. From 16 on, the rate of false alarms is the nominal one (tests)."""
EFFECTIVE = 8
"""Independent samples, at least, that the samples of a process must be worth. Below, an autocorrelation time that was
estimated from them is too short to rely on: intervals would miss more than one time in twenty (tests)."""
RESAMPLES = 4000
TRIMMED = 0.2
"""Share of the rounds that may lie far off at either end and move nothing."""

FASTER, SLOWER, NOTHING = "faster", "slower", "no difference seen"


@dataclass(frozen=True)
class Interval:
    """ratio: B / A. low, high: within which it lies with CONFIDENCE; None where that cannot be told, for `reason`."""

    ratio: float
    low: float | None = None
    high: float | None = None
    reason: str = ""


def word(interval: Interval, margin: float = MARGIN) -> str:
    """What a ratio of times says of B. A difference is one if chance does not explain it and it exceeds the margin.

    "" where there is no interval.
    """
    if interval.low is None or interval.high is None:
        return ""
    if interval.low > 1 and interval.ratio > 1 + margin:
        return SLOWER
    if interval.high < 1 and interval.ratio < 1 / (1 + margin):
        return FASTER
    return NOTHING


def of_rounds(pairs: Sequence[tuple[float, float]]) -> Interval:
    """From rounds of a process in which A and B took turns: a (time of A, time of B) for each, all > 0.

    Symmetric studentized bootstrap (P. Hall, The Bootstrap and Edgeworth Expansion, 1992, section 3.6), which keeps its
    word with few rounds where percentiles do not, of the trimmed mean of the logarithms of the ratios (R. Wilcox,
    Introduction to Robust Estimation and Hypothesis Testing, 2012, section 5.4.2): one round in which something else
    ran would make the interval of a plain mean hundreds of times as wide.
    """
    logs = np.array([np.log(b / a) for a, b in pairs])
    if len(logs) < ROUNDS:
        ratio = float(np.exp(logs.mean())) if len(logs) else float("nan")
        return Interval(ratio, reason=f"{len(logs)} rounds; an interval needs {ROUNDS}")
    center, error = _trimmed(logs)
    drawn, errors = _trimmed(logs[_random().integers(0, len(logs), (RESAMPLES, len(logs)))])
    moved = np.abs(drawn - center)
    # A resample of one round only has no spread: infinitely many of its errors, unless it has none at all.
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.where(moved > 0, moved / errors, 0.0)
    half = float(np.quantile(studentized, CONFIDENCE)) * float(error)
    ratio, low, high = (float(np.exp(center + part)) for part in (0.0, -half, half))
    return Interval(ratio, low, high)


def _trimmed(values: Floats) -> tuple[Floats, Floats]:
    """Of the last axis, the mean without the TRIMMED share at either end, and its standard error.

    The error is that of the winsorized values (K. Yuen, The two-sample trimmed t for unequal population variances,
    Biometrika 61, 1974).
    """
    count = values.shape[-1]
    cut = int(TRIMMED * count)
    ordered = np.sort(values, axis=-1)
    kept = ordered[..., cut : count - cut]
    winsorized = np.clip(ordered, kept[..., :1], kept[..., -1:])
    error: Floats = winsorized.std(axis=-1, ddof=1) / ((1 - 2 * cut / count) * np.sqrt(count))
    return np.asarray(kept.mean(axis=-1)), error


def of_round_samples(a: Floats, b: Floats, statistic: Statistic) -> Interval:
    """From the samples [rounds, calls] of such rounds, for statistics that a round has too few calls for.

    Bootstrap of whole rounds, A's and B's together, widened as Student's t is beside the normal distribution. Misses up
    to 3 times in 100 (tests).
    """
    ratio = float(statistic(b.ravel()) / statistic(a.ravel()))
    if len(a) < ROUNDS:
        return Interval(ratio, reason=f"{len(a)} rounds; an interval needs {ROUNDS}")
    chosen = _random().integers(0, len(a), (RESAMPLES, len(a)))
    drawn = statistic(b[chosen].reshape(RESAMPLES, -1)) / statistic(a[chosen].reshape(RESAMPLES, -1))
    return _around(ratio, drawn, len(a))


def _around(ratio: float, drawn: Floats, worth: float) -> Interval:
    """The percentiles of the resampled ratios, as much wider as t is with `worth` independent samples."""
    tail = (1 + CONFIDENCE) / 2
    wider = float(stats.t.ppf(tail, worth - 1) / stats.norm.ppf(tail))
    low, high = wider * np.log(np.quantile(drawn, [1 - tail, tail]) / ratio)
    return Interval(ratio, float(ratio * np.exp(low)), float(ratio * np.exp(high)))


def of_processes(a: Sequence[float], b: Sequence[float]) -> Interval:
    """From one number > 0 a process: Welch's t interval of the logarithms.

    No bootstrap: three processes have ten different resamples, whose widest interval misses one time in ten.
    """
    ratio = float(np.exp(np.log(b).mean() - np.log(a).mean()))
    if min(len(a), len(b)) < PROCESSES:
        return Interval(ratio, reason=few(len(a), len(b)))
    parts = [float(np.var(np.log(side), ddof=1)) / len(side) for side in (a, b)]
    error = float(np.sqrt(sum(parts)))
    if error == 0:
        return Interval(ratio, ratio, ratio)
    free = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, free)) * error
    return Interval(ratio, float(ratio * np.exp(-half)), float(ratio * np.exp(half)))


def few(a: int, b: int) -> str:
    """Why nothing is claimed."""
    return f"no claim across processes: {a} of A and {b} of B, {PROCESSES} each are needed"


def middle(samples: Floats) -> Floats:
    """The median of the last axis."""
    found: Floats = np.median(samples, axis=-1)
    return found


def of_samples(a: Sequence[float], b: Sequence[float], statistic: Statistic = middle) -> Interval:
    """From the samples of one process each, in the order in which they were taken: what these samples say.

    Circular block bootstrap (Politis and Romano, 1992) in blocks of three autocorrelation times, widened as Student's t
    is beside the normal distribution with as many independent samples as these are worth. None where those are fewer
    than EFFECTIVE. With 200 samples of a first-order autocorrelation up to 0.9 it misses up to 5 times in 100, the mean
    at 0.9 up to 12 times (tests). Nothing is claimed from it: another process may find something else.
    """
    sides = np.array(a, float), np.array(b, float)
    ratio = float(statistic(sides[1]) / statistic(sides[0]))
    drawn, worth = [], float("inf")
    for name, samples in zip("AB", sides, strict=True):
        time = autocorrelation_time(samples)
        worth = min(worth, len(samples) / time)
        if worth < EFFECTIVE:
            what = f"{name}: {len(samples)} samples with an autocorrelation time of {time:.1f} calls"
            return Interval(ratio, reason=f"{what} are worth fewer than {EFFECTIVE} independent ones")
        drawn.append(statistic(_blocks(samples, time)))
    return _around(ratio, drawn[1] / drawn[0], worth)


def autocorrelation_time(samples: Floats) -> float:
    """Calls that are worth one independent sample: 1 + 2 x the autocorrelations, up to the first within the noise."""
    count, moved = len(samples), samples - samples.mean()
    power = np.abs(np.fft.rfft(moved, 2 * count)) ** 2
    correlations = np.fft.irfft(power)[:count]
    if correlations[0] <= 0:
        return 1.0
    correlations = correlations[1 : max(count // 2, 1)] / correlations[0]
    noise = correlations < 2 / np.sqrt(count)
    end = int(np.argmax(noise)) if noise.any() else len(correlations)
    return float(1 + 2 * correlations[:end].sum())


def _blocks(samples: Floats, time: float) -> Floats:
    """Resamples [RESAMPLES, count] of blocks that begin anywhere and go on at the start where they reach the end."""
    count = len(samples)
    length = min(max(round(count ** (1 / 3)), int(np.ceil(3 * time))), max(count // 5, 1))
    starts = _random().integers(0, count, (RESAMPLES, -(-count // length), 1))
    drawn: Floats = samples[((starts + np.arange(length)) % count).reshape(RESAMPLES, -1)[:, :count]]
    return drawn


def _random() -> np.random.Generator:
    """The same numbers give the same interval."""
    return np.random.default_rng(0)
