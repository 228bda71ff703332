"""What is captured and replayed, with graphs that only pretend where there is no GPU.

Shapes: B batch, C horizon, A action dim, D any.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    PretendedGraph,
    captured,
    noise_for,
    plain_config,
    structures,
    subject_of,
    tiny_policy,
)
from torch import Tensor

from pi0exp import build, config
from pi0exp.graphs import capture
from pi0exp.graphs.capture import Tally, count_nodes, same_kind
from pi0exp.graphs.manual import Manual
from pi0exp.graphs.split import CapturedFunction, Owners, Split, tensors_of
from pi0exp.machine import Machine
from pi0exp.option import Option
from pi0exp.policy_subject import run as actions_of

GIVEN = structures()


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("option", [Manual(), Split(), Manual(max_graphs=1), Split(max_graphs=1)], ids=repr)
@pytest.mark.parametrize("pi05", [False, True])
def test_replays_are_the_plain_actions(option: Option, pi05: bool):
    plain, policy = tiny_policy(pi05), captured(option, pi05)
    for given in [*GIVEN, *GIVEN[::-1]]:
        noise_BCA = noise_for(plain, given)
        assert torch.equal(policy.sample_actions(given, noise_BCA), plain.sample_actions(given, noise_BCA))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("option", [Manual(), Split()], ids=repr)
def test_actions_that_are_held_do_not_change(option: Option):
    policy = captured(option)
    held_BCA = policy.sample_actions(GIVEN[0], noise_for(policy, GIVEN[0], 1))
    kept_BCA = held_BCA.clone()
    policy.sample_actions(GIVEN[1], noise_for(policy, GIVEN[1], 2))
    assert torch.equal(held_BCA, kept_BCA)


@pytest.mark.usefixtures("pretended")
def test_manual_counts_one_replay_a_call():
    policy = captured(Manual(max_graphs=2))
    for given in [*GIVEN, GIVEN[0]]:
        policy.sample_actions(given)
    counters = policy.counters()
    assert counters.pop("graphs/capture_s") > 0
    assert counters == {
        "graphs/captures": 4,
        "graphs/kept": 2,
        "graphs/evictions": 2,
        "graphs/replays_per_call": 1,
        "graphs/replay_us": 2.5,
        "graphs/us_per_replay": 2.5,
        "graphs/nodes": 5,
        "graphs/kernels": 4,
    }


@pytest.mark.usefixtures("pretended")
def test_split_captures_each_function_once_and_replays_the_step():
    policy = captured(Split())
    for _ in range(2):
        policy.sample_actions(GIVEN[0])
    counters, replays = policy.counters(), 3 + policy.num_steps
    # Vision, prefill, begin and the step.
    assert counters["graphs/captures"] == counters["graphs/kept"] == 4
    assert counters["graphs/replays_per_call"] == replays
    assert counters["graphs/nodes"] == 5 * replays
    assert counters["graphs/replay_us"] == 2.5 * replays


@pytest.mark.usefixtures("pretended")
def test_nodes_that_cannot_be_counted_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PretendedGraph, "nodes", None)
    monkeypatch.setattr(PretendedGraph, "kernels", None)
    policy = captured(Manual())
    policy.sample_actions(GIVEN[0])
    assert not {"graphs/nodes", "graphs/kernels"} & set(policy.counters())


# ---- one function


class Pair(NamedTuple):
    left: Tensor
    right: list[Tensor]


def function_of(compute: Callable[..., Any], owners: Owners, max_graphs: int = 8) -> CapturedFunction:
    return CapturedFunction(compute, 1, max_graphs, Tally(), owners, lambda line: None)


@pytest.mark.usefixtures("pretended")
def test_outputs_of_other_functions_are_read_in_place():
    owners = Owners()
    first = function_of(lambda x_D: Pair(2 * x_D, [3 * x_D]), owners)
    second = function_of(lambda pair, flag: pair.left + pair.right[0] * flag, owners)
    given_D = torch.ones(3)
    made = first(given_D)
    assert isinstance(made, Pair)
    assert second(made, True).tolist() == [5, 5, 5]
    recording = next(iter(second.recordings.kept.values()))
    assert [x.data_ptr() for x in recording.inputs] == [made.left.data_ptr(), made.right[0].data_ptr()]
    assert second(first(2 * given_D), True).tolist() == [10, 10, 10]
    assert len(second.recordings.kept) == 1
    # The same values elsewhere are another key, and are copied.
    assert second(Pair(made.left.clone(), [made.right[0].clone()]), True).tolist() == [10, 10, 10]
    assert len(second.recordings.kept) == 2


@pytest.mark.usefixtures("pretended")
def test_own_output_is_copied():
    """In place, each step would be a graph of its own."""
    step = function_of(lambda x_D: x_D + 1, Owners())
    x_D = torch.zeros(2)
    for _ in range(4):
        x_D = step(x_D)
    assert x_D.tolist() == [4, 4]
    assert len(step.recordings.kept) == 1


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    "other",
    [(torch.zeros(3), True), (torch.zeros(2, dtype=torch.int64), True), (torch.zeros(2), False), (torch.zeros(2), 1)],
    ids=str,
)
def test_shapes_dtypes_and_constants_are_told_apart(other: tuple[Any, ...]):
    function = function_of(lambda x_D, constant: x_D * 2, Owners())
    function(torch.zeros(2), True)
    function(torch.ones(2), True)
    assert len(function.recordings.kept) == 1
    function(*other)
    assert len(function.recordings.kept) == 2


@pytest.mark.usefixtures("pretended")
def test_memory_of_a_dropped_graph_is_nobodys():
    owners = Owners()
    first, second = function_of(lambda x_D: 2 * x_D, owners, max_graphs=1), function_of(lambda x_D: x_D + 1, owners)
    old_D = first(torch.zeros(2))
    assert owners.other_than(second, old_D)
    first(torch.zeros(3))
    assert not owners.other_than(second, old_D)
    assert second(old_D).tolist() == [1, 1]


def test_tensors_out_of_sight_are_refused():
    """They would be taken for constants and never be read again."""
    with pytest.raises(TypeError, match="graphs=split cannot capture a stage that takes or returns a Tally"):
        tensors_of([torch.zeros(1), Tally()])


def test_copies_are_of_the_same_kind():
    """Otherwise a compiled function would be compiled again for the capture."""
    normal_D = torch.ones(2)
    with torch.inference_mode():
        made_D = torch.ones(2)
        assert not same_kind(normal_D).is_inference()
        assert same_kind(made_D).is_inference()
        assert same_kind(normal_D).data_ptr() != normal_D.data_ptr()


# ---- counting nodes


class Library:
    """Answers as the driver does: first the number of nodes, then the nodes; a node's type is its index modulo 3."""

    def __init__(self, nodes: int = 7, status: int = 0) -> None:
        self.nodes, self.status = nodes, status

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:  # noqa: N802
        assert graph.value == 123
        if nodes is not None and not count._obj.value:
            return 1
        count._obj.value = self.nodes
        for i in range(0 if nodes is None else self.nodes):
            nodes[i] = i + 1
        return self.status

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:  # noqa: N802
        kind._obj.value = (node.value - 1) % 3
        return self.status


def test_nodes_and_kernels_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "_runtime", lambda: (Library(), "cuGraph"))
    assert count_nodes(123) == (7, 3)


def test_an_empty_graph_has_none(monkeypatch: pytest.MonkeyPatch):
    """A function of a stage may have nothing left to do, as Pi0's beginning where the time is computed before."""
    monkeypatch.setattr(capture, "_runtime", lambda: (Library(nodes=0), "cuGraph"))
    assert count_nodes(123) == (0, 0)


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (lambda: (Library(status=700), "cuGraph"), "answered 700"),
        (lambda: (Library(), "hipGraph"), "hipGraphGetNodes"),
        (lambda: (ctypes.CDLL(None), "cuGraph"), "cuGraphGetNodes"),
    ],
)
def test_what_cannot_be_counted_says_why(monkeypatch: pytest.MonkeyPatch, runtime: Any, reason: str):
    monkeypatch.setattr(capture, "_runtime", runtime)
    with pytest.raises(RuntimeError, match=reason):
        count_nodes(123)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's library is loaded here")
def test_no_library_is_told():
    with pytest.raises(RuntimeError, match=r"none of libcuda\.so, libamdhip64\.so is loaded"):
        count_nodes(123)


# ---- settings


@pytest.mark.parametrize("name", ["manual", "split"])
@pytest.mark.parametrize("setting", ["warmup", "max_graphs"])
def test_settings_below_1_are_refused(name: str, setting: str):
    with pytest.raises(config.UserError, match=f"graphs.{setting} is 0; it must be 1 or more"):
        config.stack(plain_config(f"graphs={name}", f"graphs.{setting}=0"))


@pytest.mark.parametrize("name", ["manual", "split"])
def test_graphs_need_a_gpu(name: str):
    (reason,) = build.unmet(config.stack(plain_config(f"graphs={name}")), Machine())
    assert reason.startswith("graphs: needs a GPU of nvidia or amd")


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize("words", ["graphs=split", "graphs=split attention=sdpa image_masking=skip"])
def test_split_on_a_gpu(model: str, words: str):
    instance = subject_of(*SHALLOW, f"model={model}", *words.split()).build(torch.device("cuda", 0), 8, lambda t: None)
    assert instance.verdict.wrong == []
    counters = instance.counters()
    assert counters["graphs/replays_per_call"] == 13
    assert counters["graphs/nodes"] >= counters["graphs/kernels"] > 100
    assert 1 < counters["graphs/replay_us"] < 1e5
    assert not any("missing" in line for line in instance.applied["graphs"])


@pytest.mark.gpu
@needs_gpu
def test_split_and_manual_launch_the_same_kernels_on_a_gpu():
    """Apart from those that split copies with and what runs between its graphs."""
    device, counts = torch.device("cuda", 0), {}
    for name in ("manual", "split"):
        made = subject_of(*SHALLOW, f"graphs={name}")
        policy = made.policy(device)
        actions_of(policy, made.on_device(made.inputs(1).items, device))
        counts[name] = policy.counters()["graphs/kernels"]
    # Between the graphs: for each step its time, dt * velocity and the sum.
    assert counts["split"] <= counts["manual"] <= counts["split"] + 5 * 10


@pytest.mark.gpu
@needs_gpu
def test_manual_on_a_gpu_counts_its_graph():
    instance = subject_of(*SHALLOW, "graphs=manual").build(torch.device("cuda", 0), 8, lambda t: None)
    assert instance.verdict.wrong == []
    counters = instance.counters()
    assert counters["graphs/replays_per_call"] == 1
    assert counters["graphs/nodes"] >= counters["graphs/kernels"] > 100
    assert 1 < counters["graphs/replay_us"] < 1e5
