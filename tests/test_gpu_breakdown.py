"""The breakdown of real profiles: it accounts for the time, tells the stages and knows the kernels."""

import gzip
import json

import pytest
import torch
from test_gpu import built

from pi0exp.breakdown import break_down, main
from pi0exp.config import MeasureConfig
from pi0exp.gpu_time import gpu_time
from pi0exp.profiling import TRACE, profile
from pi0exp.replay import ORDER, RANGES
from pi0exp.slices import Ceilings
from pi0exp.timing import device_sample_ms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

DEVICE = torch.device("cuda", 0)
STACKS = {
    "0_eager": RANGES,
    "1_graphs": ORDER,
    "2_sdpa": ORDER,
    "7_hoists": ORDER,
    "8_compiled": ORDER,
    "h200_best": ORDER,
}


@pytest.fixture(scope="module", params=STACKS)
def profiled(request, tmp_path_factory):
    instance = built(f"stack={request.param}")
    for index in range(5):
        instance.call(index)
    path = tmp_path_factory.mktemp(request.param) / TRACE
    return request.param, instance, profile(instance, 3, None, path), path


def test_time_is_accounted_for(profiled):
    found = break_down(profiled[2])
    assert found.calls == 3
    assert 0.98 <= found.metrics()["gpu/accounted_share"] <= 1.02
    assert found.shares()["other"] < 0.03
    assert found.shares()["gemm"] > 0.2


def test_dependent_launches_are_counted_once(tmp_path):
    """Most kernels of this stack begin while the one in front runs, and wait for it."""
    instance = built("stack=9_blocks")
    instance.call(0)
    found = break_down(profile(instance, 2, None, tmp_path / TRACE))
    metrics = found.metrics()
    assert metrics["gpu/overlap_share"] > 0.1
    assert 0.98 <= metrics["gpu/accounted_share"] <= 1.02
    assert found.kernels_ms <= found.span_ms
    assert sum(found.stage_ms.values()) <= found.span_ms * 1.001


def test_stages_are_told(profiled):
    name, _, trace, _ = profiled
    found = break_down(trace)
    assert found.stages_by == STACKS[name]
    assert all(sum(found.stages[stage].values()) > 0 for stage in ("vision", "prefill", "denoise"))
    assert sum(found.stages["other"].values()) < 0.1 * found.kernels_ms
    assert sum(found.stage_ms.values()) <= found.span_ms * 1.001


def test_shapes_of_products_are_known(profiled):
    """Of the patches' convolution and of products that Inductor writes itself there are none."""
    found = break_down(profiled[2])
    assert found.products_ms > 0.7 * found.ms["gemm"]
    width = profiled[1].policy.model.config.paligemma.width
    assert any(width in (row.product.n, row.product.k) for row in found.products)


def test_replays_under_the_profiler_are_hardly_slower(profiled):
    name, instance, trace, _ = profiled
    if STACKS[name] == ORDER:
        times = sorted(device_sample_ms(instance.call, index, DEVICE) for index in range(30))
        assert 0.7 < break_down(trace).busy_ms / times[15] < 1.3


def test_replay_after_the_profile_computes_the_same(profiled):
    _, instance, _, _ = profiled
    assert instance.verdict.wrong == []
    observation, noise = instance.device_items[0]
    first, second = (instance.policy.sample_actions(observation, noise) for _ in range(2))
    assert torch.equal(first, second)


def test_file_opens_in_perfetto_and_in_our_command(profiled, capsys):
    """Perfetto reads Chrome's trace events: a list of objects, each with a phase and a name."""
    path = profiled[3]
    events = json.loads(gzip.decompress(path.read_bytes()), strict=False)["traceEvents"]
    assert all("ph" in event and "name" in event for event in events)
    assert main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(break_down(profiled[2]).to_dict()))


def test_stages_of_graphs_of_their_own_are_told_by_ranges(tmp_path):
    instance = built("attention=sdpa", "graphs=split")
    found = break_down(profile(instance, 2, None, tmp_path / TRACE))
    assert found.stages_by == RANGES
    assert found.products


def test_run_has_rates_and_shares(tmp_path):
    instance = built("stack=2_sdpa")
    made = gpu_time(instance, MeasureConfig(), Ceilings(7e14, 4e12, "BFloat16"), tmp_path)
    metrics = made.metrics(device_sample_ms(instance.call, 0, DEVICE))
    assert 0.05 < metrics["gemm/ceiling_share"] < 1.2
    assert metrics["gemm/roofline_share"] >= metrics["gemm/ceiling_share"]
    assert any(name.endswith("GraphLaunch") for name in made.names)
