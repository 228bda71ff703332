"""How well the median of samples is known: a confidence interval from order statistics, dependence taken into account.

Between which ranks the median lies is a question of coin tosses: of m independent samples each falls below the median
with probability 1/2, whatever their distribution (Conover, Practical Nonparametric Statistics, section 3.2). Successive
calls are not independent: clocks drift, a disturbance lasts for several calls. What counts for a quantile is how the
signs of (sample - median) hang together (Heidelberger and Lewis 1984, Quantile estimation in dependent sequences): with
an integrated autocorrelation time of tau calls, n samples are worth n / tau independent ones.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np

CONFIDENCE = 0.95
_EXACT = 1000
"""Up to as many samples the binomial distribution is summed; beyond, the normal one agrees to less than one rank."""


@dataclass(frozen=True)
class Interval:
    """Of the median, in the unit of the samples. tau: calls that one independent sample is worth, 1 or more."""

    low: float
    high: float
    share: float
    """Half of its width over the median."""
    tau: float


def median_interval(samples: list[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The interval of the median with at least that confidence; None where the samples are too few to give one.

    Where they are worth fewer than some 30 independent ones, tau is underestimated: simulated sequences with a
    correlation of 0.9 between neighbours are covered in 90 % of the cases by 300 samples, in 95 % by 3000.
    """
    tau = autocorrelation_time(samples)
    m = int(len(samples) / tau)
    rank = lower_rank(m, confidence)
    if rank == 0:
        return None
    ordered, n = sorted(samples), len(samples)
    place = max(1, int(rank * n / m))  # the same level among all samples, rounded outwards
    low, high = ordered[place - 1], ordered[n - place]
    return Interval(low, high, (high - low) / 2 / median(samples), tau)


def lower_rank(m: int, confidence: float) -> int:
    """The largest k so that the k-th smallest and the k-th largest of m samples enclose the median; 0 where none do."""
    tail = (1 - confidence) / 2
    if m > _EXACT:
        return math.floor(m / 2 - NormalDist().inv_cdf(1 - tail) * math.sqrt(m) / 2)
    rank, mass, below = 0, 0.5**m, 0.0  # P(fewer than `rank` of m tosses show heads)
    while below + mass <= tail:
        below += mass
        mass *= (m - rank) / (rank + 1)
        rank += 1
    return rank


def autocorrelation_time(samples: list[float]) -> float:
    """Of the signs around the median, in calls: 1 + 2 times the sum of their autocorrelations, at least 1.

    Sums pairs of neighbouring lags as long as they are positive (Geyer 1992, Practical Markov chain Monte Carlo,
    initial positive sequence); what is beyond is noise.
    """
    signs = np.sign(np.asarray(samples) - median(samples)) if samples else np.zeros(0)
    n, variance = len(signs), float(signs @ signs)
    if n < 4 or variance == 0:
        return 1.0
    total = -1.0
    for lag in range(0, n // 2, 2):
        pair = float(signs[: n - lag] @ signs[lag:] + signs[: n - lag - 1] @ signs[lag + 1 :]) / variance
        if pair <= 0:
            break
        total += 2 * pair
    return max(1.0, total)
