"""Inputs that a graph finds by their addresses, and calls that begin and end on the host.

Shapes: B batch, C horizon, A action dim.
"""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import built, captured, noise_for, structures, subject_of, tiny_policy
from torch import Tensor

from pi0exp.graphs.manual import Manual
from pi0exp.graphs.none import NoGraph
from pi0exp.graphs.split import Split
from pi0exp.graphs.staging import Addresses, Packed, StagedRecording
from pi0exp.model.observation import scaled
from pi0exp.option import Option

GIVEN = structures()
SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")


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


class Kernel:
    """Stands in for `pi0exp.kernels.gather.gather`, which `test_kernels` runs: reads addresses, and answers."""

    def __init__(self) -> None:
        self.answers = True

    def __call__(self, table: Tensor, places: Tensor, out: Tensor, mail: Tensor, most: int) -> None:
        assert most == int(places[:, 1].max())
        for (start, size), address in zip(places.tolist(), table.tolist(), strict=True):
            out[start : start + size] = torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=torch.uint8)
        if self.answers:
            mail[1] = mail[0]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr("pi0exp.kernels.gather.gather", kernel)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return kernel


SOME = [LIKE[0], LIKE[1], LIKE[3]]


@pytest.mark.parametrize(
    "given",
    [SOME, [tensor.to(torch.float64) for tensor in SOME], [torch.arange(8)[2:5], *SOME[1:]]],
    ids=["as they are", "another type", "part of a tensor"],
)
def test_inputs_are_found_by_their_addresses(given: list[Tensor], kernel: Kernel):
    one, other = (Packed(SOME, torch.device("cpu")) for _ in range(2))
    one.fill(given)
    addresses = Addresses(other)
    for _ in range(2):
        other.buffer.zero_()
        addresses.write(given)
        addresses.gather()
        assert torch.equal(one.buffer, other.buffer)


def test_addresses_are_not_overwritten_before_they_were_read(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    inputs = Packed(SOME, torch.device("cpu"))
    addresses, kernel.answers, asked = Addresses(inputs), False, []

    def query() -> bool:
        """The device is at work, and done the third time it is asked."""
        asked.append(addresses._host_table.tolist())
        if len(asked) == 3:
            kernel.answers = True
            addresses.gather()
        return kernel.answers

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=query))
    addresses.write(SOME)
    first = addresses._host_table.tolist()
    addresses.gather()
    addresses.write([tensor.clone() for tensor in SOME])
    assert asked == [first] * 3
    assert addresses._host_table.tolist() != first


def test_an_error_of_the_device_ends_the_waiting(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    def query() -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    addresses, kernel.answers = Addresses(Packed(SOME, torch.device("cpu"))), False
    addresses.write(SOME)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=query))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        addresses.write(SOME)


def test_inputs_of_a_replay_that_never_came_are_not_waited_for(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    """It failed, or was interrupted, before its launch; what was launched is ended first."""
    inputs, events = Packed(SOME, torch.device("cpu")), []
    stream = SimpleNamespace(synchronize=lambda: events.append("synchronized"), query=lambda: events.append("asked"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    addresses = Addresses(inputs)
    for _ in range(2):
        addresses.write(SOME)
        addresses.gather()
    addresses.write(SOME)

    recording = StagedRecording.__new__(StagedRecording)
    recording._inputs, recording._addresses = inputs, addresses
    recording.graph = SimpleNamespace(replay=pytest.fail)
    monkeypatch.setattr(addresses, "wait", lambda: None)  # for the one above, which was not launched either
    with pytest.raises(pytest.fail.Exception):
        recording.replay(SOME)
    monkeypatch.undo()
    assert events == ["synchronized"]
    monkeypatch.setattr("pi0exp.kernels.gather.gather", kernel)
    addresses.write(SOME)
    addresses.gather()
    addresses.wait()
    assert int(addresses._host_mail[1]) == addresses._sent == 3


@pytest.mark.usefixtures("pretended")
def test_a_wrong_call_from_the_host_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = subject_of("model=tiny", "graphs=manual")
    right = built(subject)
    assert right.verdict.wrong == right.recheck() == []

    def late(self: StagedRecording, given: list[Tensor]) -> Tensor:
        """Replays before the inputs are there."""
        actions_BCA = self.output.clone()
        self.replay(given)
        return actions_BCA

    monkeypatch.setattr(StagedRecording, "replay_from_host", late)
    for reasons in (built(subject).verdict.wrong, right.recheck()):
        [reason] = reasons
        assert "from host to host declared EXACT, but changed" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("cameras", ["[true,true,true]", "[true,false,true]"])
def test_manual_on_a_gpu_launches_a_graph_and_copies_once(cameras: str):
    words = ("graphs=manual", "image_masking=skip", f"workload.cameras_present={cameras}")
    instance = subject_of(*SHALLOW, *words).build(torch.device("cuda", 0), 2, lambda t: None)
    assert instance.verdict.wrong == []
    instance.call_host(0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        instance.call_host(1)
    names = [event.name for event in recorded.events()]
    copies = [name for name in names if name.startswith("Memcpy") and ("HtoD" in name or "DtoH" in name)]
    assert copies == ["Memcpy DtoH (Device -> Pinned)"]  # what comes in is read by the graph's first kernel
    assert sum(name.startswith("gather_kernel") for name in names) == 1
    assert sum("GraphLaunch" in name for name in names) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_calls_that_nobody_waits_for_have_their_own_inputs():
    """The host is ahead of the GPU, and overwrites what it was told by address only when that was read."""
    instance = subject_of(*SHALLOW, "graphs=manual").build(torch.device("cuda", 0), 8, lambda t: None)
    policy, items = instance.policy, instance.device_items
    expected = [policy.sample_actions(*item).clone() for item in items]
    found = [policy.sample_actions(*items[i % 8]) for i in range(64)]
    torch.cuda.synchronize()
    assert all(torch.equal(actions, expected[i % 8]) for i, actions in enumerate(found))
