"""Files of profilers: each kind as its tool writes it."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from pi0exp.breakdown import break_down, chosen_device
from pi0exp.errors import UserError
from pi0exp.slices import Kind, Product
from pi0exp.traces import product_of, read_trace

TRACES = Path(__file__).parent / "data" / "traces"
TIMELINES = {
    "nsys_cuda_gpu_trace.csv": "nsys cuda_gpu_trace",
    "nsys_stdout.csv": "nsys cuda_gpu_trace",
    "rocprofv3_kernel_trace.csv": "rocprofv3 kernel trace",
    "rocpd_kernel_trace.csv": "rocprofv3 kernel trace",
    "rocprof_results.csv": "rocprof",
    "rocprofv2_results.csv": "rocprofv2",
    "omniperf_timestamps.csv": "Omniperf timestamps",
}
DEVICES = {
    "nsys_cuda_gpu_trace.csv": "Device",
    "rocprofv3_kernel_trace.csv": "Agent_Id",
    "rocprof_results.csv": "gpu-id",
    "rocprofv2_results.csv": "GPU_ID",
    "omniperf_timestamps.csv": "GPU_ID",
}
"""Where they name the GPU."""
SUMS = {
    "nsys_cuda_gpu_kern_sum.csv": "nsys cuda_gpu_kern_sum",
    "rocprofv3_kernel_stats.csv": "rocprof stats",
    "rocprof_results.stats.csv": "rocprof stats",
    "rocprof_bare_results.stats.csv": "rocprof stats",
}
DURATIONS_US = [40, 8, 30, 2, 1, 9, 40]
STARTS_US = [0, 45, 50, 82, 86, 90, 100]
"""The same seven slices stand in all CSV files."""


@pytest.mark.parametrize("name", TIMELINES)
def test_timelines(name):
    trace = read_trace(TRACES / name)
    assert trace.format == TIMELINES[name]
    assert [one.duration_us for one in trace.slices] == pytest.approx(DURATIONS_US, abs=1e-6)
    starts = [one.start_us - trace.slices[0].start_us for one in trace.slices]
    assert starts == pytest.approx(STARTS_US, abs=1e-6)
    assert trace.timed
    assert len({one.device for one in trace.slices}) == 1
    assert trace.calls is None


@pytest.mark.parametrize("name", DEVICES)
def test_gpus_of_a_file_are_told_apart(tmp_path, name):
    with (TRACES / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    first, rows[-1][DEVICES[name]] = rows[0][DEVICES[name]], "another"
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    trace = read_trace(tmp_path / name)
    with pytest.raises(UserError, match="kernels of 2 GPUs"):
        break_down(trace)
    assert [one.duration_us for one in chosen_device(trace, "another").slices] == pytest.approx(DURATIONS_US[-1:])
    assert [one.duration_us for one in chosen_device(trace, first).slices] == pytest.approx(DURATIONS_US[:-1])


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    trace = read_trace(TRACES / name)
    assert trace.format == SUMS[name]
    assert not trace.timed
    largest = trace.slices[0]
    assert (largest.count, largest.duration_us) == (2, pytest.approx(80))
    listed = DURATIONS_US if name.startswith("roc") else [40, 8, 30, 9, 40]  # this table of nsys has kernels only
    assert sum(one.duration_us for one in trace.slices) == pytest.approx(sum(listed))


def test_names_without_quotes_keep_their_commas():
    """As older rocprofs write them."""
    found = read_trace(TRACES / "rocprof_bare_results.stats.csv")
    assert found == read_trace(TRACES / "rocprof_results.stats.csv")
    assert any(", at::native::CUDAFunctor_add<c10::BFloat16>, " in one.name for one in found.slices)


def test_times_are_exact_to_the_nanosecond(tmp_path):
    """A machine that has been up for weeks counts 16 digits of nanoseconds."""
    path, start = tmp_path / "kernel_trace.csv", 4123456789012345
    rows = [f'"k",{start + 1000 * i},{start + 1000 * i + 3}\n' for i in range(1000)]
    path.write_text('"Kernel_Name","Start_Timestamp","End_Timestamp"\n' + "".join(rows))
    found = break_down(read_trace(path))
    assert found.kernels_ms * 1e6 == pytest.approx(3000, abs=1e-3)
    assert found.span_ms * 1e6 == pytest.approx(999003, abs=1e-3)


def test_kinds_of_nsys():
    kinds = [one.kind for one in read_trace(TRACES / "nsys_cuda_gpu_trace.csv").slices]
    assert kinds == [Kind.kernel] * 3 + [Kind.copy, Kind.fill] + [Kind.kernel] * 2


@pytest.mark.parametrize(("unit", "scale"), [("us", 1e3), ("ms", 1e6), ("s", 1e9), ("nsec", 1), ("usec", 1e3)])
def test_units_of_nsys(tmp_path, unit, scale):
    path = tmp_path / "sum.csv"
    path.write_text(f"Time (%),Total Time ({unit}),Instances,Name\n100.0,{80000 / scale:.9f},2,nvjet\n")
    assert read_trace(path).slices[0].duration_us == pytest.approx(80)


@pytest.mark.parametrize(("vendor", "graph"), [("h200", "cudaGraphLaunch"), ("mi350", "hipGraphLaunch")])
def test_kineto_trace_of_a_graph(vendor, graph):
    trace = read_trace(TRACES / f"kineto_{vendor}_graph.json")
    assert graph in trace.runtime
    assert graph in trace.names()
    assert trace.calls == 2
    assert len(trace.launched) == 7
    assert {one.stage for one in trace.launched} == {"vision", "prefill", "denoise"}
    # A replay tells neither stages nor operations.
    assert {one.stage for one in trace.slices} == {""}
    assert {one.product for one in trace.slices} == {None}
    assert [one.kind for one in trace.slices[:9]] == [
        Kind.copy,
        *[Kind.kernel] * 4,
        Kind.fill,
        *[Kind.kernel] * 2,
        Kind.copy,
    ]
    assert trace.ceilings is not None
    assert (trace.ceilings.flops_per_s, trace.ceilings.dtype) == (8e14, "BFloat16")


def test_trace_recorded_on_a_gpu():
    """Of `experiments/record_trace.py`: a graph of all stages, whose kernels and pauses are the whole span."""
    trace = read_trace(TRACES / "kineto_nvidia-h100-80gb-hbm3_real.json.gz")
    found = break_down(trace)
    assert (found.calls, len(trace.slices)) == (2, 580)
    assert found.ms["other"] == 0
    assert min(found.ms[kind] for kind in ("gemm", "attention", "norm", "activation", "elementwise", "copy")) > 0
    assert found.busy_ms + found.idle_share * found.span_ms == pytest.approx(found.span_ms, rel=0.02)
    assert set(found.stage_ms) >= {"vision", "prefill", "denoise"}
    assert any(row.product.k == 2048 for row in found.products)


def test_nsys_recorded_on_a_gpu():
    """`nsys profile -t cuda` (2025.3) of products, GELU, attention and norms, three times, and a copy to the host."""
    timeline = read_trace(TRACES / "nsys_cuda_gpu_trace_real.csv")
    sums = read_trace(TRACES / "nsys_cuda_gpu_kern_sum_real.csv")
    found = break_down(timeline)
    assert len(timeline.slices) == 24
    assert found.busy_ms == pytest.approx(0.105025)  # as awk adds the column Duration
    assert found.span_ms == pytest.approx(870.173547)
    assert found.ms["other"] == 0
    kernels = [one for one in timeline.slices if one.kind is Kind.kernel]
    assert sum(one.count for one in sums.slices) == len(kernels) == 16
    assert sum(one.duration_us for one in sums.slices) == pytest.approx(sum(one.duration_us for one in kernels))
    kinds = ("gemm", "attention", "norm", "activation", "elementwise")
    assert [break_down(sums).ms[kind] for kind in kinds] == pytest.approx([found.ms[kind] for kind in kinds])


def test_kineto_trace_of_launches():
    trace = read_trace(TRACES / "kineto_h200_launched.json")
    assert (trace.calls, trace.launched) == (2, [])
    assert [one.stage for one in trace.slices[:7]] == ["vision", *["prefill"] * 4, *["denoise"] * 2]
    assert [one.product for one in trace.slices[:7]] == [
        Product(1, 16, 64, 32, "BFloat16"),
        None,
        Product(1, 16, 32, 64, "BFloat16"),
        Product(1, 16, 32, 64, "BFloat16"),
        None,
        Product(1, 16, 16, 32, "BFloat16"),
        Product(1, 16, 16, 32, "BFloat16"),
    ]
    # The two kernels of a split product are one operation.
    assert trace.slices[2].op == trace.slices[3].op != trace.slices[5].op


def test_compressed_and_bare_lists_are_the_same(tmp_path):
    source = (TRACES / "kineto_h200_launched.json").read_text()
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(source.encode()))
    (tmp_path / "misnamed.json").write_bytes(gzip.compress(source.encode()))
    (tmp_path / "list.json").write_text(json.dumps(json.loads(source)["traceEvents"]))
    wanted = read_trace(TRACES / "kineto_h200_launched.json")
    assert read_trace(tmp_path / "t.json.gz") == read_trace(tmp_path / "misnamed.json") == wanted
    assert read_trace(tmp_path / "list.json").slices == wanted.slices


def test_without_ranges_all_slices_count(tmp_path):
    found = json.loads((TRACES / "kineto_h200_graph.json").read_text())
    found["traceEvents"] = [event for event in found["traceEvents"] if event.get("cat") != "user_annotation"]
    (tmp_path / "foreign.json").write_text(json.dumps(found))
    trace = read_trace(tmp_path / "foreign.json")
    assert (len(trace.slices), trace.calls, trace.launched) == (7 + 2 * 9, None, [])


def test_slices_whose_launch_is_not_recorded_belong_to_what_had_begun(tmp_path):
    found = json.loads((TRACES / "kineto_mi350_graph.json").read_text())
    ranges = {"pi0exp.launched": [], "pi0exp.call": []}
    for event in found["traceEvents"]:
        if event.get("cat") == "user_annotation" and event["name"] in ranges:
            ranges[event["name"]].append(event["ts"])
    slices = [event for event in found["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for i, event in enumerate(slices):
        del event["args"]["correlation"]
        event["ts"] = (ranges["pi0exp.launched"][0] if i < 7 else max(ranges["pi0exp.call"])) + 0.25 * i
    (tmp_path / "t.json").write_text(json.dumps(found))
    trace = read_trace(tmp_path / "t.json")
    assert len(trace.launched) == 7
    assert [one.call for one in trace.slices] == [1] * 18


@pytest.mark.parametrize(
    ("name", "shapes", "product"),
    [
        ("aten::mm", [[11, 64], [64, 32]], (1, 11, 32, 64)),
        ("aten::addmm", [[32], [11, 64], [64, 32], []], (1, 11, 32, 64)),
        ("aten::bmm", [[8, 11, 64], [8, 64, 32]], (8, 11, 32, 64)),
        ("aten::baddbmm", [[8, 11, 32], [8, 11, 64], [8, 64, 32]], (8, 11, 32, 64)),
        ("pi0exp::gemm", [[2, 11, 64], [32, 64], []], (1, 22, 32, 64)),
        ("pi0exp::skinny_gemm", [[11, 64], [32, 64], [9]], (1, 11, 32, 64)),
        ("aten::mm", [[11, 64], [65, 32]], None),
        ("aten::mm", [], None),
        ("aten::add", [[11, 64], [64, 32]], None),
        ("pi0exp::rms_norm", [[11, 64], [64, 64]], None),
    ],
)
def test_shapes_of_products(name, shapes, product):
    found = product_of(name, {"Input Dims": shapes, "Input type": ["c10::BFloat16"] * len(shapes)})
    assert found == (None if product is None else Product(*product, "BFloat16"))
