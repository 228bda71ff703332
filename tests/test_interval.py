"""The interval of the median covers it as often as it says, whether calls are independent or hang together."""

from math import comb

import numpy as np
import pytest

from pi0exp.interval import autocorrelation_time, lower_rank, median_interval


def chain(phi: float, n: int, random: np.random.Generator) -> list[float]:
    """A stationary autoregressive sequence around 10."""
    noise, value, values = random.standard_normal(n), random.standard_normal(), []
    for step in noise:
        value = phi * value + (1 - phi**2) ** 0.5 * step
        values.append(10 + value)
    return values


@pytest.mark.parametrize("m", [6, 10, 31, 200, 999])
def test_rank_is_the_largest_that_keeps_the_confidence(m: int):
    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(m, i) for i in range(k)) / 2**m

    rank = lower_rank(m, 0.95)
    assert coverage(rank) >= 0.95 > coverage(rank + 1)


def test_few_samples_give_no_interval():
    assert lower_rank(5, 0.95) == 0
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert median_interval([]) is None


def test_normal_approximation_meets_the_exact_sum():
    def exact(m: int) -> int:
        below = rank = 0
        while 40 * (below + comb(m, rank)) <= 2**m:
            below += comb(m, rank)
            rank += 1
        return rank

    assert abs(lower_rank(1001, 0.95) - exact(1001)) <= 1
    assert abs(lower_rank(3000, 0.95) - exact(3000)) <= 1


@pytest.mark.parametrize(("phi", "n"), [(0.0, 300), (0.6, 300), (0.9, 3000)])
def test_interval_covers_the_median(phi: float, n: int):
    """Of 200 sequences: 95 % give or take four standard errors."""
    random, trials = np.random.default_rng(1), 200
    found = [median_interval(chain(phi, n, random)) for _ in range(trials)]
    covered = sum(one is not None and one.low <= 10 <= one.high for one in found) / trials
    assert covered >= 0.95 - 4 * (0.95 * 0.05 / trials) ** 0.5
    if phi == 0:
        assert covered <= 0.995


def test_interval_of_independent_samples_is_not_wider_than_it_must_be():
    """Half width of a normal median: 1.96 * 1.2533 / sqrt(n) standard deviations."""
    random = np.random.default_rng(2)
    widths = [median_interval(chain(0.0, 300, random)).share for _ in range(100)]
    assert np.mean(widths) == pytest.approx(1.96 * 1.2533 / 300**0.5 / 10, rel=0.2)


def test_autocorrelation_time():
    """The signs of a Gaussian chain correlate by 2/pi * asin(phi^lag): 2.4 calls for phi = 0.6."""
    random = np.random.default_rng(3)
    expected = 1 + 2 * sum(2 / np.pi * np.arcsin(0.6**lag) for lag in range(1, 50))
    found = np.mean([autocorrelation_time(chain(0.6, 3000, random)) for _ in range(20)])
    assert found == pytest.approx(expected, rel=0.15)
    assert np.mean([autocorrelation_time(chain(0.0, 3000, random)) for _ in range(20)]) == pytest.approx(1, abs=0.15)
    assert autocorrelation_time([1.0, 2.0] * 50) == 1
    assert autocorrelation_time([5.0] * 100) == 1


def test_drift_widens_the_interval():
    steady, drifting = chain(0.0, 200, np.random.default_rng(4)), [10 + 0.01 * i for i in range(200)]
    assert median_interval(steady).tau < 3
    one = median_interval(drifting)
    assert one is None or one.tau > 20


def test_equal_samples_have_an_interval_of_no_width():
    found = median_interval([3.0] * 30)
    assert (found.low, found.high, found.share, found.tau) == (3, 3, 0, 1)
