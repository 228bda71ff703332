"""What is captured and replayed, with graphs that only pretend where there is no GPU.

Shapes: B batch, C horizon, A action dim, D any.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import PretendedGraph, built, noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from torch import Tensor

from pi0exp import build, config
from pi0exp.graphs import capture
from pi0exp.graphs.capture import Tally, count_nodes, same_kind
from pi0exp.graphs.manual import Manual
from pi0exp.graphs.none import NoGraph
from pi0exp.graphs.split import CapturedFunction, Owners, Split, tensors_of
from pi0exp.graphs.staging import Packed, StagedRecording
from pi0exp.machine import Machine
from pi0exp.model.observation import scaled
from pi0exp.option import Option
from pi0exp.policy import Policy
from pi0exp.policy_subject import run as actions_of


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "Graph", PretendedGraph)


def captured(option: Option, pi05: bool = False) -> Policy:
    policy = tiny_policy(pi05)
    policy.begin("graphs")
    option.apply(policy)
    return policy


GIVEN = [
    tiny_observation([(1, 1, 1)], [8], seed=1),
    tiny_observation([(1, 1, 1)], [8], seed=2),
    tiny_observation([(1, 0, 1)], [5], seed=3),
    tiny_observation([(1, 1, 1), (0, 0, 1)], [8, 3], seed=4),
]


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
@pytest.mark.parametrize("option", [Manual(), Manual(max_graphs=1), Split(), NoGraph()], ids=repr)
def test_a_call_from_host_to_host_gives_the_same_actions(option: Option):
    """Here device and host are the same; that the tensors are copied shows where they are changed afterwards."""
    plain, policy = tiny_policy(), captured(option)
    assert policy.staged == isinstance(option, Manual)
    held = []
    for given in [*GIVEN, *GIVEN[::-1]]:
        noise_BCA = noise_for(plain, given)
        expected_BCA = plain.sample_actions(given, noise_BCA)
        own = given.with_tensors([tensor.clone() for tensor in given.tensors()])
        held.append((policy.act(own, noise_BCA), expected_BCA))
        for tensor in own.tensors():
            tensor.zero_()
        assert torch.equal(policy.sample_actions(given, noise_BCA), expected_BCA)
    assert all(torch.equal(actions_BCA, expected_BCA) for actions_BCA, expected_BCA in held)


@pytest.mark.usefixtures("pretended")
def test_calls_from_the_host_and_from_the_device_share_a_graph():
    policy = captured(Manual())
    policy.act(GIVEN[0])
    policy.sample_actions(GIVEN[1])
    policy.act(GIVEN[1])
    assert policy.counters()["graphs/captures"] == 1
    assert policy.counters()["graphs/replays_per_call"] == 1
    # Pictures that are scaled already are another structure.
    images = {name: scaled(image) for name, image in GIVEN[0].images.items()}
    noise_BCA = noise_for(policy, GIVEN[0])
    expected_BCA = policy.act(GIVEN[0], noise_BCA)
    assert torch.equal(policy.act(replace(GIVEN[0], images=images), noise_BCA), expected_BCA)
    assert policy.counters()["graphs/captures"] == 2


LIKE = [torch.arange(3), torch.ones(2, 5, dtype=torch.bool), torch.zeros(1, 0), torch.randn(2, 300)[:, ::2]]


def test_packed_tensors_are_apart_and_aligned():
    packed = Packed(LIKE, torch.device("cpu"))
    packed.fill(LIKE)
    for own, tensor in zip(packed.tensors, LIKE, strict=True):
        assert torch.equal(own, tensor)
        assert own.is_contiguous()
        assert own.storage_offset() * own.element_size() % 256 == 0
    assert packed.buffer.numel() == 256 + 256 + 0 + 1280
    copy = Packed(LIKE, torch.device("cpu"))
    copy.buffer.copy_(packed.buffer)
    assert all(torch.equal(own, tensor) for own, tensor in zip(copy.tensors, LIKE, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        LIKE,
        [tensor.to(torch.float64) for tensor in LIKE],  # of another type: converted, as by copy_
        # As wide as three words, but not where words begin.
        [torch.arange(25, dtype=torch.uint8)[1:].view(torch.uint8), *LIKE[1:]],
    ],
    ids=["as they are", "another type", "beside a word"],
)
def test_tensors_are_copied_at_once_whatever_they_are(given: list[Tensor]):
    like = [given[0] if given[0].dtype == torch.uint8 else LIKE[0], *LIKE[1:]]
    one, other = (Packed(like, torch.device("cpu")) for _ in range(2))
    one.fill(given)
    other.fill_at_once(given)
    assert one.buffer.any()
    assert torch.equal(one.buffer, other.buffer)


@pytest.mark.usefixtures("pretended")
def test_a_wrong_call_from_the_host_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = subject_of("model=tiny", "graphs=manual")
    assert not built(subject).verdict.wrong

    def late(self: StagedRecording, given: list[Tensor]) -> Tensor:
        """Replays before the inputs are there."""
        actions_BCA = self.output.clone()
        self.replay(given)
        return actions_BCA

    monkeypatch.setattr(StagedRecording, "replay_from_host", late)
    [reason] = built(subject).verdict.wrong
    assert "from host to host declared EXACT, but changed" in reason


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


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cameras", ["[true,true,true]", "[true,false,true]"])
def test_manual_on_a_gpu_copies_once_in_and_once_out(cameras: str):
    words = ("graphs=manual", "image_masking=skip", f"workload.cameras_present={cameras}")
    instance = subject_of(*SHALLOW, *words).build(torch.device("cuda", 0), 2, lambda t: None)
    assert instance.verdict.wrong == []
    instance.call_host(0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        instance.call_host(1)
    names = [event.name for event in recorded.events()]
    copies = [name for name in names if name.startswith("Memcpy") and ("HtoD" in name or "DtoH" in name)]
    assert sorted(copies) == ["Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)"]
    assert sum("GraphLaunch" in name for name in names) == 1
