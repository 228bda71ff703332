"""Sums over a trace: categories, span, idle share, stages, products, and the command."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from time import perf_counter

import pytest
from cli import error_line, module

from pi0exp import breakdown
from pi0exp.breakdown import break_down
from pi0exp.breakdown_text import text
from pi0exp.errors import UserError
from pi0exp.experiments.record_trace import slim
from pi0exp.kernel_table import CATEGORIES
from pi0exp.replay import ORDER, RANGES
from pi0exp.slices import Ceilings, Kind, Product, Slice, Trace
from pi0exp.traces import read_trace

TRACES = Path(__file__).parent / "data" / "traces"
CSV = [
    "nsys_cuda_gpu_trace.csv", "nsys_stdout.csv", "rocprofv3_kernel_trace.csv", "rocpd_kernel_trace.csv",
    "rocprof_results.csv", "rocprofv2_results.csv", "omniperf_timestamps.csv",
]  # fmt: skip


def at(start_us: float, duration_us: float, name: str = "gemm", **more) -> Slice:
    return Slice(name, duration_us, start_us, **more)


def trace(*slices: Slice) -> Trace:
    return Trace("made", list(slices))


@pytest.mark.parametrize("name", CSV)
def test_timeline_is_accounted_for(name):
    found = break_down(read_trace(TRACES / name))
    nonzero = {category: ms for category, ms in found.ms.items() if ms}
    assert nonzero == pytest.approx(
        {"gemm": 0.080, "attention": 0.027, "norm": 0.008, "elementwise": 0.009, "copy": 0.003}, abs=1e-6
    )
    # 0-40, 45-53 and 50-80, 82-84, 86-87, 90-99, 100-140: 127 of 140 us, 3 us doubly, those of the norm at 45.
    assert (found.span_ms, found.busy_ms, found.overlap_ms) == pytest.approx((0.140, 0.127, 0.003), abs=1e-6)
    assert found.kernels_ms == pytest.approx(found.busy_ms)
    assert found.kernels_ms + found.idle_share * found.span_ms == pytest.approx(found.span_ms)
    assert found.launches == 7
    assert found.metrics()["gpu/accounted_share"] == pytest.approx(1)
    assert found.metrics()["gpu/overlap_share"] == pytest.approx(3 / 140)


@pytest.mark.parametrize(
    "name",
    [
        "nsys_cuda_gpu_kern_sum.csv",
        "rocprofv3_kernel_stats.csv",
        "rocprof_results.stats.csv",
        "rocprof_bare_results.stats.csv",
    ],
)
def test_sums_tell_no_span(name):
    found = break_down(read_trace(TRACES / name))
    assert found.ms["gemm"] == pytest.approx(0.080)
    assert (found.kernels[0].count, found.kernels[0].category) == (2, "gemm")
    assert (found.span_ms, found.busy_ms, found.overlap_ms, found.idle_share) == (None, None, None, None)
    assert not any(metric.startswith("gpu/") and metric != "gpu/launches" for metric in found.metrics())


@pytest.mark.parametrize("path", sorted(TRACES.iterdir()), ids=lambda path: path.name)
def test_every_trace_is_accounted_for(path):
    """Those in whose name is `real` were written by a profiler on a GPU (the json: experiments/record_trace.py)."""
    found = break_down(read_trace(path))
    assert found.shares()["other"] < 0.03
    assert sum(found.shares().values()) == pytest.approx(1)
    if found.span_ms is not None:
        assert 0 <= found.idle_share < 1
        assert found.kernels_ms == pytest.approx(found.busy_ms)
        assert 0.98 <= found.metrics()["gpu/accounted_share"] <= 1.02
    if "real.json" in path.name:
        assert found.calls == 2
        assert found.stages_by in (ORDER, RANGES)
        assert all(sum(found.stages[stage].values()) > 0 for stage in ("vision", "prefill", "denoise"))
        assert found.products_ms > 0.7 * found.ms["gemm"]


@pytest.mark.parametrize("path", sorted(TRACES.glob("kineto_*")), ids=lambda path: path.name)
def test_trace_that_is_made_small_says_the_same(path, tmp_path):
    content = path.read_bytes()
    found = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content, strict=False)
    found["traceEvents"] += [
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 3},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 1, "dur": 1, "pid": 1, "tid": 1, "args": {}},
    ]
    small = slim(found | {"traceName": "/somewhere/trace.json"})
    assert len(small["traceEvents"]) <= len(found["traceEvents"]) - 2
    assert "traceName" not in small
    (tmp_path / "small.json").write_text(json.dumps(small))
    assert read_trace(tmp_path / "small.json") == read_trace(path)


def times(found: breakdown.Breakdown) -> dict[str, float]:
    """Name -> microseconds of its kernels; the whole is accounted for, whatever they are."""
    assert found.metrics()["gpu/accounted_share"] == pytest.approx(1)
    assert sum(row.ms for row in found.kernels) == pytest.approx(found.busy_ms)
    assert sum(found.metrics()[f"kernels_share/{name}"] for name in CATEGORIES) == pytest.approx(1)
    return {row.name: row.ms * 1e3 for row in found.kernels}


def test_union_of_nested_and_touching_slices():
    found = break_down(trace(at(0, 100), at(10, 20), at(40, 10), at(100, 5), at(95, 15)))
    assert (found.span_ms, found.busy_ms) == pytest.approx((0.110, 0.110))
    assert found.overlap_ms == pytest.approx(0.040)  # 10-30, 40-50, 95-105
    assert found.idle_share == pytest.approx(0)
    assert times(found) == pytest.approx({"gemm": 110})


def test_chain_of_dependent_launches_counts_no_waiting():
    """Each begins in the middle of the one before and, when that has ended, takes as long again; the last are apart."""
    chain = [at(5 * i, 10, f"gemm_{i}") for i in range(4)]  # 0-10, 5-15, 10-20, 15-25
    found = break_down(trace(*chain, at(30, 4, "rms_norm"), at(32, 4, "attention")))
    assert times(found) == pytest.approx(
        {"gemm_0": 10, "gemm_1": 5, "gemm_2": 5, "gemm_3": 5, "rms_norm": 4, "attention": 2}
    )
    assert found.ms["gemm"] == pytest.approx(0.025)
    assert (found.span_ms, found.busy_ms) == pytest.approx((0.036, 0.031))
    assert found.metrics()["gpu/overlap_share"] == pytest.approx(17 / 36)


def test_overlap_of_three_counts_once_in_the_share_of_overlap():
    """As in a chain whose second kernel lets the third begin before the first has ended."""
    found = break_down(trace(at(0, 10, "a"), at(2, 12, "b"), at(4, 20, "c")))
    assert times(found) == pytest.approx({"a": 10, "b": 4, "c": 10})
    assert found.metrics()["gpu/overlap_share"] == pytest.approx(12 / 24)


def test_slice_within_another_has_no_time_of_its_own():
    found = break_down(trace(at(0, 100, "outer"), at(20, 30, "inner"), at(110, 10, "last")))
    assert times(found) == pytest.approx({"outer": 100, "last": 10, "inner": 0})
    assert found.launches == 3
    assert found.metrics()["gpu/overlap_share"] == pytest.approx(30 / 120)


def test_two_streams_that_share_the_gpu():
    """A long kernel beside short ones: theirs is what it leaves over; and two that begin in the same instant."""
    short = [at(start, 10, "short") for start in (5, 25, 45)]
    found = break_down(trace(at(0, 50, "long"), *short, at(60, 30, "whole"), at(60, 10, "half")))
    assert times(found) == pytest.approx({"long": 50, "whole": 20, "half": 10, "short": 5})
    assert found.metrics()["gpu/overlap_share"] == pytest.approx((10 + 10 + 5 + 10) / 90)
    assert found.metrics()["gpu/idle_share"] == pytest.approx(5 / 90)


@pytest.mark.parametrize("seed", range(20))
def test_own_times_are_those_of_a_count_instant_by_instant(seed):
    """Random slices on whole microseconds, each microsecond looked at by itself."""
    random = Random(seed)
    slices = [at(random.randrange(60), random.randrange(1, 25), f"kernel_{i}") for i in range(random.randrange(1, 9))]
    wanted = dict.fromkeys((one.name for one in slices), 0)
    overlap = 0
    for instant in range(100):
        if running := [one for one in slices if one.start_us <= instant < one.end_us]:
            wanted[min(running, key=lambda one: (one.start_us, one.end_us)).name] += 1
            overlap += len(running) > 1
    found = break_down(trace(*sorted(slices, key=lambda one: one.start_us)))
    assert times(found) == pytest.approx(wanted)
    assert found.overlap_ms == pytest.approx(overlap * 1e-3)
    assert found.busy_ms == pytest.approx(sum(wanted.values()) * 1e-3)


def test_overlapping_stages_have_their_own_times():
    """The first kernel of a stage begins while the last one of the stage before runs; 30-40 is a gap."""
    slices = [at(0, 20, call=0, stage="vision"), at(15, 15, call=0, stage="prefill")]
    slices += [at(18, 2, call=0, stage="prefill"), at(40, 10, call=0, stage="denoise")]
    # Behind the whole there is a kernel that ends within the last but one.
    slices += [at(44, 2, call=0, stage="other")]
    found = break_down(trace(*slices))
    stages = {stage: sum(values.values()) for stage, values in found.stages.items()}
    assert stages == pytest.approx({"vision": 0.020, "prefill": 0.010, "denoise": 0.010, "other": 0})
    assert found.stage_ms == pytest.approx({"vision": 0.020, "prefill": 0.020, "denoise": 0.010, "other": 0})
    assert sum(found.stage_ms.values()) == pytest.approx(found.span_ms)


def test_long_traces_take_no_quadratic_time():
    slices = [at(5 * i, 10, f"gemm_{i % 50}", call=i // 10_000) for i in range(40_000)]
    start = perf_counter()
    found = break_down(trace(*slices))
    assert perf_counter() - start < 10  # a second where nothing else runs
    assert found.metrics()["gpu/accounted_share"] == pytest.approx(1)
    assert found.kernels_ms * found.calls == pytest.approx(200.005)


def test_times_of_one_call():
    slices = [at(100 * call + start, 10, call=call) for call in range(4) for start in (0, 20)]
    found = break_down(trace(*slices))
    assert (found.calls, found.launches) == (4, 2)
    assert found.ms["gemm"] == pytest.approx(0.020)
    assert found.span_ms == pytest.approx(0.330 / 4)  # with the gaps between the calls
    assert found.idle_share == pytest.approx(1 - 80 / 330)


def test_calls_may_be_given_where_the_trace_does_not_mark_them():
    assert break_down(trace(at(0, 10), at(20, 10)), calls=2).ms["gemm"] == pytest.approx(0.010)
    with pytest.raises(UserError, match="marks 1 calls itself"):
        break_down(trace(at(0, 10, call=0)), calls=2)


@pytest.mark.parametrize("name", ["kineto_h200_graph.json", "kineto_mi350_graph.json"])
def test_stages_and_products_of_a_graph_by_the_order_of_its_kernels(name):
    found = break_down(read_trace(TRACES / name))
    assert found.stages_by == ORDER
    assert {stage: round(sum(values.values()), 6) for stage, values in found.stages.items()} == {
        "vision": 0.040,
        "prefill": 0.030,
        "denoise": 0.020,
        "other": 0.005,  # copies into and out of the graph, and the fill between two stages
    }
    assert found.stages["prefill"]["activation"] == pytest.approx(0.006)
    shapes = {(row.product.m, row.product.n, row.product.k): (row.count, row.ms) for row in found.products}
    assert shapes == {
        (16, 64, 32): (1, pytest.approx(0.040)),
        (16, 32, 64): (1, pytest.approx(0.024)),  # with the kernel that adds up its parts
        (16, 16, 32): (2, pytest.approx(0.020)),
    }
    assert found.products_ms == pytest.approx(found.ms["gemm"])


def test_launched_calls_tell_the_same_by_ranges():
    launched = break_down(read_trace(TRACES / "kineto_h200_launched.json"))
    replayed = break_down(read_trace(TRACES / "kineto_h200_graph.json"))
    assert launched.stages_by == RANGES
    assert launched.products == replayed.products
    assert launched.stages["vision"] == pytest.approx(replayed.stages["vision"])


def test_stage_times_have_the_gaps_behind_them():
    stages = ["vision", "vision", "", "denoise", "", "denoise"]
    slices = [at(20 * i, 10, call=0, stage=stage) for i, stage in enumerate(stages)]
    slices += [replace(one, call=1, start_us=one.start_us + 1000) for one in slices]
    found = break_down(trace(*slices))
    assert found.stage_ms == pytest.approx({"vision": 0.040, "prefill": 0, "denoise": 0.030, "other": 0.040})


def test_rates_of_products_against_the_ceilings_of_the_run():
    source = read_trace(TRACES / "kineto_h200_launched.json")
    row = break_down(replace(source, ceilings=Ceilings(4e9, 1e15, "BFloat16"))).products[0]
    flops = 2 * 16 * 64 * 32
    assert row.tflop_per_s * 1e12 == pytest.approx(flops / 40e-6)
    assert row.of_ceiling == row.of_roofline == pytest.approx(flops / 40e-6 / 4e9)
    row = break_down(replace(source, ceilings=Ceilings(1e15, 1e9, "BFloat16"))).products[0]
    assert row.of_roofline == pytest.approx(2 * (16 * 32 + 32 * 64 + 16 * 64) / 1e9 / 40e-6)
    row = break_down(replace(source, ceilings=Ceilings(4e9, 1e15, "float"))).products[0]
    assert (row.of_ceiling, row.of_roofline) == (None, None)  # measured for another type


def test_rates_of_products_that_overlap():
    """Over their own times: those of a chain give the rate at which the GPU did all of them. One within another has
    none."""
    shapes = [Product(1, 16, 16, 2**i, "BFloat16") for i in range(3)]
    chain = [at(5 * i, 10, "gemm", op=i, product=shapes[min(i, 1)]) for i in range(3)]
    within = at(16, 2, "gemm", op=9, product=shapes[2])
    found = break_down(replace(trace(*chain, within), ceilings=Ceilings(1e9, 1e12, "BFloat16")))
    rows = {row.product: row for row in found.products}
    assert rows[shapes[0]].tflop_per_s == pytest.approx(shapes[0].flops / 10e-6 / 1e12)
    assert (rows[shapes[1]].count, rows[shapes[1]].ms) == (2, pytest.approx(0.010))
    assert rows[shapes[1]].tflop_per_s == pytest.approx(shapes[1].flops / 5e-6 / 1e12)
    hidden = rows[shapes[2]]
    assert (hidden.ms, hidden.tflop_per_s, hidden.of_ceiling, hidden.of_roofline) == (0, None, None, None)
    flops = shapes[0].flops + 2 * shapes[1].flops + shapes[2].flops
    assert found.metrics()["gemm/tflop_per_s"] == pytest.approx(flops / 20e-6 / 1e12)
    assert found.metrics()["gemm/shapes_known_share"] == pytest.approx(1)
    assert "16 x 16 x 4" in text(found, 9)


def test_products_without_any_time_of_their_own_have_no_rate():
    found = break_down(trace(at(0, 10, "attention"), at(2, 2, "gemm", op=0, product=Product(1, 1, 2, 3, "float"))))
    assert not any(name.startswith("gemm/") for name in found.metrics())
    assert "TFLOP/s" not in text(found, 9)


def test_metrics():
    found = break_down(read_trace(TRACES / "kineto_h200_graph.json"))
    metrics = found.metrics()
    assert {f"kernels_ms/{name}" for name in CATEGORIES} | {f"kernels_share/{name}" for name in CATEGORIES} <= set(
        metrics
    )
    assert sum(value for name, value in metrics.items() if name.startswith("kernels_share/")) == pytest.approx(1)
    stages = sum(value for name, value in metrics.items() if name.startswith("kernels_ms_"))
    assert stages == pytest.approx(found.kernels_ms)
    assert metrics["gpu/launches"] == 9
    assert metrics["gpu/idle_share"] == pytest.approx(1 - found.busy_ms / found.span_ms)
    assert metrics["gemm/shapes_known_share"] == pytest.approx(1)
    assert metrics["gemm/tflop_per_s"] == pytest.approx(2 * (2 * 16 * 64 * 32 + 2 * 16 * 16 * 32) / 84e-6 / 1e12)


def test_several_gpus_are_told_apart():
    both = trace(at(0, 10, device="0"), at(0, 30, device="1"))
    with pytest.raises(UserError, match="kernels of 2 GPUs"):
        break_down(both)
    assert break_down(breakdown.chosen_device(both, "1")).ms["gemm"] == pytest.approx(0.030)
    with pytest.raises(UserError, match="no kernel of GPU '2'"):
        breakdown.chosen_device(both, "2")


def test_trace_without_any_time():
    with pytest.raises(UserError, match="no time"):
        break_down(trace(at(0, 0)))


def test_copies_count_whatever_they_are_called():
    assert break_down(trace(at(0, 10, kind=Kind.copy), at(20, 10, kind=Kind.fill))).ms["copy"] == pytest.approx(0.020)


def test_text_says_how_overlap_is_counted():
    assert "overlap                  33.3 % of the span, counted for the one that began first" in text(
        break_down(trace(at(0, 10), at(5, 10))), 9
    )
    assert "overlap" not in text(break_down(trace(at(0, 10), at(10, 10))), 9)


# ---- the command


def test_command_prints_a_card(tmp_path):
    done = module("pi0exp.breakdown", TRACES / "kineto_h200_graph.json", "--top", 2, scratch=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Chrome trace: 2 calls" in done.stdout
    assert "idle 12.0 %" in done.stdout
    assert "5 more" in done.stdout
    assert "16 x 64 x 32" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_command_prints_json(tmp_path, capsys):
    assert breakdown.main([str(TRACES / "nsys_cuda_gpu_trace.csv"), "--json", "--calls", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ms"]["gemm"] == pytest.approx(0.040)
    assert found["idle_share"] == pytest.approx(1 - 127 / 140)
    assert found["kernels"][0]["count"] == 1
    assert found["stages_by"].startswith("not told apart: ")


def test_command_names_the_file_that_is_wrong(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert error_line(module("pi0exp.breakdown", tmp_path / "x.json", scratch=tmp_path)).startswith(
        f"{tmp_path}/x.json"
    )
    assert breakdown.main([str(TRACES / "nsys_cuda_gpu_trace.csv"), "--device", "7"]) == 2
    assert "nsys_cuda_gpu_trace.csv: holds no kernel of GPU '7'" in capsys.readouterr().err
    assert breakdown.main([str(TRACES / "nsys_cuda_gpu_trace.csv"), "--calls", "0"]) == 2
    assert "--calls 0: must be 1 or more" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        breakdown.main(["--help"])
    assert ended.value.code == 0
    assert "example: python -m pi0exp.breakdown" in capsys.readouterr().out
