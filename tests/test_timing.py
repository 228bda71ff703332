"""Samples and their summary, with a clock that goes as the test says."""

import gc
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pi0exp import timing
from pi0exp.config import MeasureConfig
from pi0exp.timing import (
    LOOK_EVERY,
    WINDOW,
    doubts,
    measure_samples,
    paced_samples,
    percentile,
    quiet,
    steadiness,
    summary,
    wall_sample_ms,
    warm_up,
)

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a call takes them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, ms: Callable[[int], float]) -> Callable[[int], None]:
        """A call that takes `ms(index)`."""

        def run(index: int) -> None:
            self.now += ms(index) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=made, sleep=made.sleep))
    return made


def config(**values: float) -> MeasureConfig:
    return MeasureConfig(**{"warmup_calls": 1, "warmup_s": 0.0, "warmup_max_s": 1000.0} | values)


def ignore(text: str) -> None:
    pass


# ---- summary


@pytest.mark.parametrize("size", [1, 2, 3, 10, 199, 200])
@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
def test_percentile_is_numpys(size: int, percent: int):
    samples = np.random.default_rng(size).lognormal(size=size).tolist()
    assert percentile(samples, percent) == pytest.approx(np.percentile(samples, percent), rel=1e-12)


def test_percentile_leaves_the_order_of_the_samples():
    samples = [3.0, 1.0, 2.0]
    assert percentile(samples, 50) == 2.0
    assert samples == [3.0, 1.0, 2.0]


def test_summary():
    samples = np.random.default_rng(0).lognormal(size=50).tolist()
    expected = {f"latency_ms/p{percent}": np.percentile(samples, percent) for percent in (10, 50, 90, 99)}
    expected |= {"latency_ms/mean": np.mean(samples), "latency_ms/std": np.std(samples)}
    assert summary(samples) == pytest.approx(expected)


def test_summary_of_one_sample():
    assert set(summary([7.0]).values()) == {7.0, 0.0}


def test_sample_is_in_milliseconds(clock: Clock):
    assert wall_sample_ms(clock.call(lambda index: 12.5), 0) == pytest.approx(12.5)


# ---- warm-up


def test_warm_up_ends_as_soon_as_two_windows_agree(clock: Clock):
    assert warm_up(clock.call(lambda index: 10.0), CPU, config()) == {
        "warmup/calls": 2.0 * WINDOW,
        "warmup/settled": 1.0,
    }


def test_warm_up_waits_until_the_times_settle(clock: Clock):
    """Each call is 3 % faster than the one before, 40 times; then the windows agree once they lie behind it."""
    metrics = warm_up(clock.call(lambda index: 50.0 * 0.97 ** min(index, 40)), CPU, config())
    assert metrics["warmup/settled"] == 1
    assert 40 + WINDOW // 2 < metrics["warmup/calls"] <= 40 + 2 * WINDOW


@pytest.mark.parametrize(("drift", "settled"), [(0.005, True), (0.02, False)])
def test_warm_up_settles_within_one_percent(clock: Clock, drift: float, settled: bool):
    """Calls that get faster by `drift` a window."""
    metrics = warm_up(clock.call(lambda index: 10.0 * (1 - drift) ** (index / WINDOW)), CPU, config(warmup_max_s=1.0))
    assert metrics["warmup/settled"] == settled


def test_warm_up_takes_the_configured_calls_and_seconds(clock: Clock):
    assert warm_up(clock.call(lambda index: 10.0), CPU, config(warmup_calls=77))["warmup/calls"] == 77
    assert warm_up(clock.call(lambda index: 10.0), CPU, config(warmup_s=0.995))["warmup/calls"] == 100


def test_warm_up_ends_at_its_time_limit(clock: Clock):
    """Each call is slower than the one before."""
    metrics = warm_up(clock.call(lambda index: 10.0 * 1.1**index), CPU, config(warmup_max_s=1.0))
    assert metrics["warmup/settled"] == 0
    assert clock.now - 100 >= 1.0
    assert metrics["warmup/calls"] == 26  # 10 ms * (1.1^25 - 1) / 0.1 is 0.98 s


def test_warm_up_makes_its_calls_even_beyond_the_time_limit(clock: Clock):
    metrics = warm_up(clock.call(lambda index: 1e4), CPU, config(warmup_calls=5, warmup_max_s=1.0))
    assert metrics == {"warmup/calls": 5.0, "warmup/settled": 0.0}


def test_warm_up_takes_turns_with_the_inputs(clock: Clock):
    seen: list[int] = []
    warm_up(lambda index: seen.append(index) or clock.call(lambda i: 1.0)(index), CPU, config())
    assert seen == list(range(len(seen)))


# ---- samples


def test_samples_are_counted(clock: Clock):
    call = clock.call(lambda index: float(index))
    samples = measure_samples(lambda i: wall_sample_ms(call, i), 5, 1e9, ignore, "measure")
    assert samples == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])


def test_samples_end_at_the_time_limit(clock: Clock):
    call = clock.call(lambda index: 100.0)
    samples = measure_samples(lambda i: wall_sample_ms(call, i), 1000, 0.95, ignore, "measure")
    assert len(samples) == 10


def test_there_is_always_one_sample(clock: Clock):
    call = clock.call(lambda index: 1e6)
    assert len(measure_samples(lambda i: wall_sample_ms(call, i), 200, 0.0, ignore, "measure")) == 1


def test_progress_is_told_now_and_then(clock: Clock):
    told: list[str] = []
    call = clock.call(lambda index: 1000.0)
    measure_samples(lambda i: wall_sample_ms(call, i), 20, 1e9, told.append, "measure")
    assert 2 <= len(told) <= 5
    assert told[-1].startswith("measure ")
    assert "/20  p50 1e+03 ms" in told[-1]


def test_no_garbage_collection_among_the_samples():
    states = [gc.isenabled()]
    numbers = count()
    measure_samples(lambda i: states.append(gc.isenabled()) or float(next(numbers)), 3, 10.0, ignore, "measure")
    assert states == [True, False, False, False]
    assert gc.isenabled()


def test_quiet_restores_garbage_collection():
    def fail() -> None:
        with quiet():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()


def test_quiet_leaves_garbage_collection_off_where_it_was():
    gc.disable()
    try:
        with quiet():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- until the median is known


def noisy(spread: float, seed: int = 0) -> Callable[[int], float]:
    values = 10 * (1 + spread * np.random.default_rng(seed).standard_normal(5000))
    return lambda index: float(values[index])


def sampled(clock: Clock, ms: Callable[[int], float], count: int, max_s: float, share: float | None) -> list[float]:
    call = clock.call(ms)
    return measure_samples(lambda i: wall_sample_ms(call, i), count, max_s, ignore, "measure", share)


def test_sampling_goes_on_until_the_median_is_known(clock: Clock):
    """Half the interval is 2.46 spreads over sqrt(n): 0.5 % of 5 % noise takes about 600 calls."""
    samples = sampled(clock, noisy(0.05), 50, 1e9, 0.005)
    assert 300 < len(samples) < 1200
    assert (len(samples) - 50) % LOOK_EVERY == 0
    assert steadiness(samples)["latency_ms/p50_ci_share"] <= 0.005
    assert steadiness(samples[:-LOOK_EVERY])["latency_ms/p50_ci_share"] > 0.005


def test_sampling_makes_its_calls_even_if_the_median_is_known_before(clock: Clock):
    assert len(sampled(clock, lambda index: 10.0, 200, 1e9, 0.005)) == 200
    assert len(sampled(clock, noisy(0.05), 50, 1e9, None)) == 50


def test_sampling_ends_at_its_limit_and_says_that_the_median_is_not_known(clock: Clock):
    samples = sampled(clock, noisy(0.3), 50, 1.0, 0.001)
    assert 90 < len(samples) < 110
    settings = MeasureConfig(ci_share=0.001)
    told = doubts({"warmup/settled": 1.0} | steadiness(samples), settings)
    assert list(told) == ["median"]
    assert "with 95 % confidence after" in told["median"]
    assert told["median"].endswith("0.1 % wanted")


def test_drifting_calls_are_sampled_to_the_limit(clock: Clock):
    """Each a little slower: whatever the noise, the median is not known."""
    samples = sampled(clock, lambda index: 10.0 + index / 100, 50, 5.0, 0.005)
    assert clock.now - 100 >= 5.0
    assert steadiness(samples)["sampling/drift_share"] > 0.05


def test_steady_and_known_median_raises_no_doubt():
    samples = [10 + noisy(0.001)(i) / 1000 for i in range(200)]
    metrics = {"warmup/settled": 1.0, "warmup/calls": 20.0} | steadiness(samples)
    assert doubts(metrics, MeasureConfig(ci_share=0.005)) == {}
    assert doubts(metrics | {"warmup/settled": 0.0}, MeasureConfig(ci_share=None)) == {
        "warm_up": "not settled after 20 calls"
    }


def test_steadiness():
    samples = [10.0] * 90 + [11.0] * 90 + [30.0] * 10 + [11.0] * 80
    found = steadiness(samples)
    assert found["sampling/count"] == 270
    assert found["sampling/drift_share"] == pytest.approx(0.1)
    assert found["sampling/outlier_share"] == pytest.approx(10 / 270)
    assert found["sampling/tau"] > 10


def test_few_samples_have_no_interval():
    found = steadiness([10.0, 10.1, 10.2])
    assert "latency_ms/p50_ci_share" not in found
    told = doubts(found | {"warmup/settled": 1.0}, MeasureConfig(ci_share=0.005))
    assert told["median"].startswith("unknown with 95 % confidence after 3 calls")


# ---- at a robot's pace


def test_paced_calls_begin_at_fixed_times(clock: Clock):
    begun: list[float] = []
    call = clock.call(lambda index: 10.0 + index)

    def sample(index: int) -> float:
        begun.append(clock.now - 100)
        return wall_sample_ms(call, index)

    samples, late = paced_samples(sample, 5, 100.0, 1e9, ignore)
    assert samples == pytest.approx([10, 11, 12, 13, 14])
    assert begun == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert late == 0


def test_calls_that_take_too_long_for_their_pace_are_late(clock: Clock):
    """The second takes 250 ms: the third and fourth begin late, the fifth on time again."""
    call = clock.call(lambda index: 250.0 if index == 1 else 10.0)
    _, late = paced_samples(lambda i: wall_sample_ms(call, i), 6, 100.0, 1e9, ignore)
    assert late == pytest.approx(2 / 6)
