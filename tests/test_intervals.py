"""Intervals keep their word on noise as GPUs have it: samples that resemble those before them."""

import numpy as np
import pytest
from scipy import signal, stats

from pi0exp import intervals
from pi0exp.interleave import DEFAULT_ROUNDS, pairs
from pi0exp.intervals import (
    FASTER,
    NOTHING,
    SLOWER,
    Interval,
    of_processes,
    of_round_samples,
    of_rounds,
    of_samples,
    word,
)

BLOCK = 8
NOMINAL = 1 - intervals.CONFIDENCE


def noise(random: np.random.Generator, shape: tuple[int, ...], phi: float) -> np.ndarray:
    """First-order autoregressive noise of unit variance along the last axis."""
    start = 3000 if phi > 0.9 else 200
    white = random.standard_normal((*shape[:-1], shape[-1] + start)) * np.sqrt(1 - phi**2)
    return signal.lfilter([1], [1, -phi], white)[..., start:]


def turns(random: np.random.Generator, phi: float, shift: float) -> list[tuple[float, float]]:
    """Rounds A B B A of calls of 16 ms whose clock wanders by 1 % and whose calls scatter by 0.3 %; B has a shift."""
    calls = 4 * DEFAULT_ROUNDS * BLOCK
    times = 16 * np.exp(0.01 * noise(random, (calls,), phi) + 0.003 * random.standard_normal(calls))
    blocks = times.reshape(DEFAULT_ROUNDS, 4, BLOCK)
    a, b = blocks[:, [0, 3]], blocks[:, [1, 2]] * (1 + shift)
    return pairs(a.ravel().tolist(), b.ravel().tolist(), BLOCK)


def at_most(count: int, rate: float) -> int:
    """What a rate passes once in a thousand tries."""
    return int(stats.binom.ppf(0.999, count, rate))


def false_alarms(phi: float, count: int) -> tuple[int, int]:
    """Of the interval, and of the verdict with its margin."""
    random = np.random.default_rng(round(1000 * phi))
    found = [of_rounds(turns(random, phi, 0.0)) for _ in range(count)]
    return sum(not one.low <= 1 <= one.high for one in found), sum(word(one) != NOTHING for one in found)


def test_same_stack_is_not_found_different():
    missed, called = false_alarms(0.95, 300)
    assert missed <= at_most(300, NOMINAL)
    assert called <= missed


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.0, 0.7, 0.95, 0.99, 0.999])
def test_false_alarms_are_at_most_nominal(phi):
    missed, called = false_alarms(phi, 1500)
    assert missed <= at_most(1500, NOMINAL)
    assert called <= at_most(1500, NOMINAL)


@pytest.mark.parametrize("phi", [0.0, 0.9, 0.99])
def test_shift_of_three_percent_is_found(phi):
    random = np.random.default_rng(1)
    found = [word(of_rounds(turns(random, phi, 0.03))) for _ in range(60)]
    assert found.count(SLOWER) >= 0.95 * len(found)
    found = [word(of_rounds(turns(random, phi, -0.03))) for _ in range(60)]
    assert found.count(FASTER) >= 0.95 * len(found)


P90, P99 = (lambda x: np.percentile(x, 90, axis=-1)), (lambda x: np.percentile(x, 99, axis=-1))


def by_rounds(random: np.random.Generator, phi: float, statistic, shift: float = 0.0) -> Interval:
    times = 16 * np.exp(0.01 * noise(random, (4 * 20 * BLOCK,), phi) + 0.003 * random.standard_normal(4 * 20 * BLOCK))
    blocks = times.reshape(20, 4, BLOCK)
    a, b = blocks[:, [0, 3]].reshape(20, -1), blocks[:, [1, 2]].reshape(20, -1) * (1 + shift)
    return of_round_samples(a, b, statistic)


def test_other_statistics_by_whole_rounds():
    random = np.random.default_rng(8)
    same = [by_rounds(random, 0.9, P90) for _ in range(20)]
    assert sum(not one.low <= 1 <= one.high for one in same) <= at_most(20, 0.03)
    assert all(word(by_rounds(random, 0.9, P90, 0.05)) == SLOWER for _ in range(3))
    few = of_round_samples(np.ones((9, 16)), np.ones((9, 16)), P90)
    assert few.low is None
    assert "9 rounds; an interval needs 10" in few.reason


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [P90, P99], ids=["p90", "p99"])
@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_false_alarms_of_other_statistics(phi, statistic):
    random, count = np.random.default_rng(9), 200
    found = [by_rounds(random, phi, statistic) for _ in range(count)]
    assert sum(not one.low <= 1 <= one.high for one in found) <= at_most(count, 0.03)


@pytest.mark.slow
def test_mean_of_one_process_misses_as_often_as_stated():
    random, count, missed = np.random.default_rng(5), 300, 0
    for _ in range(count):
        a, b = 16 * np.exp(0.01 * noise(random, (2, 200), 0.9))
        found = of_samples(a.tolist(), b.tolist(), lambda x: np.mean(x, axis=-1))
        missed += found.low is not None and not found.low <= 1 <= found.high
    assert missed <= at_most(count, 0.12)


def test_single_samples_as_units_would_cry_wolf():
    """Why blocks: the samples of a stack, halved, differ far beyond what independent ones would."""
    random, cried = np.random.default_rng(2), 0
    for _ in range(100):
        halves = (16 * np.exp(0.01 * noise(random, (400,), 0.95))).reshape(2, 200)
        cried += stats.mannwhitneyu(*halves).pvalue < NOMINAL
    assert cried > 30


def test_too_few_rounds_have_no_interval():
    found = of_rounds([(1.0, 1.5)] * (intervals.ROUNDS - 1))
    assert found.ratio == pytest.approx(1.5)
    assert found.low is found.high is None
    assert word(found) == ""
    assert "9 rounds; an interval needs 10" in found.reason


@pytest.mark.parametrize(("rounds", "astray"), [(intervals.ROUNDS, [1.3]), (DEFAULT_ROUNDS, [1.3, 100.0, 0.4])])
def test_rounds_in_which_something_else_ran_hide_nothing(rounds, astray):
    """Beside rounds that agree to 0.1 %, some that lie far off."""
    random = np.random.default_rng(4)
    given = [(1.0, ratio) for ratio in 1.03 * np.exp(0.001 * random.standard_normal(rounds))]
    for index, factor in enumerate(astray):
        given[3 * index] = (1.0, factor * given[3 * index][1])
    found = of_rounds(given)
    assert word(found) == SLOWER
    assert 1.02 < found.low < 1.03 < found.high < 1.04


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [12, DEFAULT_ROUNDS])
def test_rounds_astray_raise_no_alarms(rounds):
    random, count = np.random.default_rng(6), 3000
    logs = 0.002 * random.standard_normal((count, rounds))
    logs += 0.3 * random.choice([-1, 0, 1], p=[0.025, 0.95, 0.025], size=logs.shape)
    found = [of_rounds([(1.0, np.exp(log)) for log in one]) for one in logs]
    assert sum(not one.low <= 1 <= one.high for one in found) <= at_most(count, NOMINAL)


def test_rounds_without_any_noise():
    found = of_rounds([(2.0, 2.2)] * 12)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_the_same_numbers_give_the_same_interval():
    given = turns(np.random.default_rng(3), 0.5, 0.0)
    assert of_rounds(given) == of_rounds(given)


def test_processes_by_welch():
    a, b = [10.0, 10.1, 10.3], [11.0, 11.4, 11.1, 11.3]
    found = of_processes(a, b)
    test = stats.ttest_ind(np.log(b), np.log(a), equal_var=False)
    low, high = test.confidence_interval(intervals.CONFIDENCE)
    assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
    assert found.ratio == pytest.approx(np.exp(np.mean(np.log(b)) - np.mean(np.log(a))))


def test_processes_alike_are_not_found_different():
    random, count = np.random.default_rng(4), 2000
    found = [of_processes(*np.exp(0.01 * random.standard_normal((2, 3))).tolist()) for _ in range(count)]
    assert sum(not one.low <= 1 <= one.high for one in found) <= at_most(count, NOMINAL)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (3, 2)])
def test_nothing_is_claimed_from_few_processes(a, b):
    found = of_processes([10.0] * a, [20.0] * b)
    assert word(found) == ""
    assert found.reason == f"no claim across processes: {a} of A and {b} of B, 3 each are needed"


def test_processes_without_any_noise():
    found = of_processes([10.0] * 3, [20.0] * 3)
    assert (found.ratio, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_autocorrelation_time(phi):
    found = [intervals.autocorrelation_time(noise(np.random.default_rng(seed), (20_000,), phi)) for seed in range(3)]
    assert np.mean(found) == pytest.approx((1 + phi) / (1 - phi), rel=0.15)
    assert intervals.autocorrelation_time(np.ones(50)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [intervals.middle, lambda x: np.percentile(x, 90, axis=-1)], ids=["p50", "p90"])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_samples_of_one_process(phi, statistic):
    """The rate that the docstring states."""
    random, count = np.random.default_rng(5), 250
    missed = 0
    for _ in range(count):
        a, b = 16 * np.exp(0.01 * noise(random, (2, 200), phi))
        found = of_samples(a.tolist(), b.tolist(), statistic)
        missed += found.low is not None and not found.low <= 1 <= found.high
    assert missed <= at_most(count, 0.05)


def test_samples_that_hang_together_have_no_interval():
    steps = [10.0] * 50 + [12.0] * 50
    found = of_samples(steps, steps[::-1])
    assert found.low is None
    assert "A: 100 samples with an autocorrelation time of" in found.reason
    assert "are worth fewer than 8 independent ones" in found.reason


def test_samples_apart_are_told_apart():
    random = np.random.default_rng(6)
    a, b = 16 * np.exp(0.01 * noise(random, (2, 200), 0.5))
    found = of_samples(a.tolist(), (1.05 * b).tolist())
    assert word(found) == SLOWER
    assert found.low < found.ratio < found.high


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(1.03, 1.02, 1.04), SLOWER),
        (Interval(0.97, 0.96, 0.98), FASTER),
        (Interval(1.03, 0.99, 1.07), NOTHING),
        (Interval(1.004, 1.003, 1.005), NOTHING),
        (Interval(0.996, 0.995, 0.997), NOTHING),
        (Interval(1.03), ""),
    ],
)
def test_word(interval, expected):
    assert word(interval) == expected


def test_margin_is_the_callers():
    assert word(Interval(1.03, 1.02, 1.04), margin=0.05) == NOTHING
    assert word(Interval(1.004, 1.003, 1.005), margin=0.001) == SLOWER
