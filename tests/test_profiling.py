"""The profile of a run. A CPU has no kernels: here are tested the ranges, the shapes and the way of the file."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, PretendedGraph, subject_of

from pi0exp.breakdown import break_down
from pi0exp.config import MeasureConfig
from pi0exp.gpu_time import GpuTime, gpu_time
from pi0exp.graphs import capture
from pi0exp.policy_subject import PolicyInstance
from pi0exp.profiling import NAMES, TRACE, profile
from pi0exp.slices import Ceilings
from pi0exp.subject import Verdict
from pi0exp.traces import product_of, read_trace

DATA = Path(__file__).parent / "data" / "traces"
STAGES = ["vision", "prefill", "denoise", "denoise", "denoise"]  # begin, and two steps
RANGES = [f"pi0exp.stage.{stage}" for stage in STAGES]


def instance_of(*words: str) -> PolicyInstance:
    """Built, but not verified."""
    subject = subject_of("model=tiny", "workload.num_steps=2", *words)
    items = subject.inputs(1).items
    return PolicyInstance(subject, subject.policy(CPU), Verdict(), {}, {}, items, subject.on_device(items, CPU))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def ranges(found: dict[str, Any]) -> list[str]:
    """The names of our ranges in the order of time."""
    events = [event for event in found["traceEvents"] if event.get("cat") == "user_annotation"]
    ours = [event for event in events if event["name"].startswith("pi0exp.")]
    return [event["name"] for event in sorted(ours, key=lambda event: event["ts"])]


def test_call_without_a_graph_is_profiled_as_it_is(tmp_path):
    instance = instance_of()
    settings = MeasureConfig(profile_calls=2)
    made = gpu_time(instance, settings, Ceilings(8e14, 4e12, NAMES["bf16"]), tmp_path / "kept")
    found = read(tmp_path / "kept" / TRACE)
    assert ranges(found) == ["pi0exp.call", *RANGES] * 2
    assert found["pi0exp_ceilings"] == {"flops_per_s": 8e14, "bytes_per_s": 4e12, "dtype": "BFloat16"}
    events = [event for event in found["traceEvents"] if event.get("cat") == "cpu_op"]
    products = {product_of(event["name"], event["args"]) for event in events} - {None}
    expert = instance.policy.model.config.expert
    rows = instance.policy.horizon + 1
    assert any((one.m, one.n, one.k) == (rows, expert.mlp_dim, expert.width) for one in products)
    assert "denoise_step" not in vars(instance.policy.model)  # the method is put back

    assert made.found is None
    assert (made.metrics(1.0), made.files()) == ({}, {})
    assert made.facts() == {"kernels": "the profiler recorded none"}


def test_trace_that_is_not_wanted_is_not_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pi0exp.gpu_time.profile", lambda *given: asked.append(given[-1]) or read_trace(DATA / "kineto_h200_graph.json")
    )
    for keep_trace in (True, False):
        gpu_time(None, MeasureConfig(keep_trace=keep_trace), None, tmp_path)
    assert asked[0] == tmp_path / TRACE
    assert not asked[1].is_relative_to(tmp_path)
    assert not asked[1].parent.exists()


@pytest.mark.parametrize("graphs", ["manual", "split"])
def test_graphs_are_launched_one_by_one_first(tmp_path, monkeypatch, graphs):
    monkeypatch.setattr(capture, "Graph", PretendedGraph)
    instance = instance_of(f"graphs={graphs}")
    instance.call(0)
    replays = instance.counters()["graphs/replays_per_call"]
    profile(instance, 1, None, tmp_path / TRACE)
    names = ranges(read(tmp_path / TRACE))
    assert names[: len(RANGES) + 1] == ["pi0exp.launched", *RANGES]
    # One graph for the whole call passes through no stage; graphs of stages do.
    assert names[len(RANGES) + 1 :] == ["pi0exp.call", *(RANGES if graphs == "split" else [])]
    assert instance.counters()["graphs/replays_per_call"] == replays


def test_launched_calls_compute_the_same_and_replay_nothing(monkeypatch):
    monkeypatch.setattr(capture, "Graph", PretendedGraph)
    instance = instance_of("graphs=manual")
    observation, noise = instance.device_items[0]
    wanted = instance.policy.sample_actions(observation, noise)
    replays: list[str] = []
    monkeypatch.setattr(PretendedGraph, "replay", lambda graph: replays.append("replay"))
    seen = set()

    def watch(stage, function):
        seen.add(stage)
        return function

    with instance.launched(watch):
        assert torch.equal(instance.policy.sample_actions(observation, noise), wanted)
    assert (seen, replays) == ({"vision", "prefill", "denoise"}, [])
    instance.policy.sample_actions(observation, noise)
    assert replays == ["replay"]


def test_without_a_graph_there_is_nothing_to_launch_one_by_one():
    assert instance_of().launched(lambda stage, function: function) is None


# ---- what a run keeps of it


def made_from(name: str) -> GpuTime:
    trace = read_trace(DATA / name)
    return GpuTime(trace.names(), break_down(trace))


def test_metrics_of_a_run():
    made = made_from("kineto_h200_graph.json")
    metrics = made.metrics(0.1)
    assert metrics["gpu/span_over_p50"] == pytest.approx(metrics["gpu/span_ms"] / 0.1)
    assert metrics["stage_ms/denoise"] == pytest.approx(made.found.stage_ms["denoise"])
    assert json.loads(made.files()["breakdown.json"])["launches"] == 9
    assert made.facts() == {}


def test_stage_times_of_launched_calls_are_left_to_events():
    metrics = made_from("kineto_h200_launched.json").metrics(0.1)
    assert not any(name.startswith("stage_ms/") for name in metrics)
    assert metrics["kernels_ms_vision/gemm"] > 0


def test_stages_that_are_not_told_apart_are_a_fact():
    trace = replace(read_trace(DATA / "kineto_h200_graph.json"), launched=[])
    made = GpuTime(trace.names(), break_down(trace))
    assert made.facts()["kernels by stage"].startswith("not told apart: ")
    assert not any(name.startswith(("kernels_ms_", "stage_ms/")) for name in made.metrics(0.1))


def test_without_memory_for_a_launched_call_the_rest_is_profiled(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "Graph", PretendedGraph)
    instance = instance_of("graphs=manual")
    instance.call(0)

    def full(instance):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("pi0exp.profiling.call_launched", full)
    profile(instance, 1, None, tmp_path / TRACE)
    assert ranges(read(tmp_path / TRACE)) == ["pi0exp.call"]


def test_profile_that_cannot_be_read_is_no_fault_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "torn.json").write_text("{")
    monkeypatch.setattr("pi0exp.gpu_time.profile", lambda *given: read_trace(tmp_path / "torn.json"))
    with pytest.raises(RuntimeError, match=r"the profile cannot be read: .*torn"):
        gpu_time(None, MeasureConfig(), None, tmp_path)
