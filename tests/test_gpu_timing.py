"""What only a GPU can show of timing, power and ceilings: that independent measurements of one thing agree."""

import time

import pytest
import torch
from helpers import plain_config

from pi0exp import subject
from pi0exp.passes import state
from pi0exp.power import measure_power
from pi0exp.rates import measure_rate
from pi0exp.sensors import open_sensors
from pi0exp.stages import stage_samples
from pi0exp.timing import device_sample_ms, percentile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
GPU = torch.device("cuda", 0)


def ignore(text: str) -> None:
    pass


def built(*overrides: str):
    return subject.subject(plain_config(*SHALLOW, *overrides)).build(GPU, 8, ignore)


@pytest.mark.parametrize("graphs", ["none", "split"])
def test_stages_add_up_to_the_call(graphs: str):
    """The same calls with and without marks: as long in the median, but for the marks themselves and noise."""
    instance = built(f"graphs={graphs}", "attention=sdpa")
    for index in range(20):
        device_sample_ms(instance.call, index, GPU)
    plain = [device_sample_ms(instance.call, index, GPU) for index in range(60)]
    found = stage_samples(instance, GPU, 60, 60.0, ignore)
    assert set(found) == {"vision", "prefill", "denoise", "other"}
    whole = [sum(parts) for parts in zip(*found.values(), strict=True)]
    assert percentile(whole, 50) == pytest.approx(percentile(plain, 50), rel=0.1)
    assert all(min(times) >= 0 for times in found.values())


def test_whole_graph_has_no_stages():
    assert stage_samples(built("graphs=manual", "attention=sdpa"), GPU, 3, 60.0, ignore) == {}


def test_compiled_stages_are_not_compiled_anew():
    instance = built("compile_mode=default", "attention=sdpa")
    for index in range(3):
        instance.call(index)
    before = instance.counters()["compile/graphs"]
    assert stage_samples(instance, GPU, 3, 60.0, ignore)
    instance.call(0)
    assert instance.counters()["compile/graphs"] == before


def test_energy_of_counter_and_samples_agrees():
    """Products of 8192 x 8192 matrices for 10 s: within 5 %, and as much as the power limit allows."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    out, sensors = torch.empty_like(a), open_sensors(GPU)

    def call(index: int) -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize()

    made = measure_power(call, sensors, 10.0)
    print(made.source, made.metrics)
    if not made.source.startswith("energy counter"):
        pytest.skip(f"this GPU has no energy counter: {made.source}")
    assert made.metrics["energy_j/uncertainty"] <= 0.05 * made.metrics["energy_j/call"]
    assert made.metrics["power_w/mean"] <= 1.05 * sensors.power_limit_w()
    assert made.metrics["power_w/mean"] > 0.3 * sensors.power_limit_w()


def test_sensors_tell_of_this_process():
    keep = torch.ones(2**28, device=GPU)
    torch.cuda.synchronize()
    told = state(open_sensors(GPU))
    assert told.numbers["clock_mhz/sm"] > 100
    assert 10 < told.numbers["temperature_c/gpu"] < 110
    assert told.throttle is not None
    assert keep.sum() == 2**28


def test_ceilings_are_those_of_a_real_gpu():
    """A burst is at least as fast as what is kept up, and bf16 products faster than float32 ones."""
    copy, narrow, wide = (measure_rate(kind, GPU, 0.5) for kind in ("copy", "bf16", "fp32"))
    for rate in (copy, narrow, wide):
        assert 0.3 * rate.burst < rate.sustained <= rate.burst
    assert narrow.burst > 2 * wide.burst
    again = measure_rate("copy", GPU, 0.5)
    assert again.burst == pytest.approx(copy.burst, rel=0.05)


def test_paced_calls_begin_on_time():
    from pi0exp.timing import paced_samples

    instance = built("graphs=manual", "attention=sdpa")
    start = time.perf_counter()
    samples, late = paced_samples(lambda i: device_sample_ms(instance.call, i, GPU), 20, 50.0, 60.0, ignore)
    assert time.perf_counter() - start == pytest.approx(19 * 0.05, abs=0.1)
    assert len(samples) == 20
    assert late <= 0.1
