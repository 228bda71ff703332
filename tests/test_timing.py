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
from pi0exp.timing import WINDOW, measure_samples, percentile, quiet, summary, wall_sample_ms, warm_up

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a call takes them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def call(self, ms: Callable[[int], float]) -> Callable[[int], None]:
        """A call that takes `ms(index)`."""

        def run(index: int) -> None:
            self.now += ms(index) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=made))
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
