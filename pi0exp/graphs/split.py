"""Each function of a stage as a CUDA (HIP) graph of its own: vision, prefill, begin and the denoising step.

Ten steps are ten replays of one graph, and the operations between them run from Python. More launches and more gaps
than one graph for the whole call (`graphs=manual`); it is here to show what that granularity costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pi0exp.graphs.capture import Capture, Note, Recording, Recordings, Tally, bypassed
from pi0exp.model.observation import Observation
from pi0exp.option import STAGES
from pi0exp.policy import DeviceCall, Policy

_CONSTANTS = (bool, int, float, str, torch.dtype, type(None))
"""Leaves that are no tensors, compared by value."""


@dataclass(frozen=True)
class Split(Capture):
    """Capture each function of a stage once for each structure of its arguments.

    max_graphs is for each function by itself.
    """

    def apply(self, policy: Policy) -> None:
        tally, owners = Tally(), Owners()

        def capture(function: Callable[..., Any]) -> "CapturedFunction":
            return CapturedFunction(function, self.warmup, self.max_graphs, tally, owners, policy.note)

        def count(call: DeviceCall) -> DeviceCall:
            def counted(observation: Observation, noise_BCA: Tensor) -> Tensor:
                tally.begin_call()
                # The next call may overwrite it; what the caller holds must not change under it.
                return call(observation, noise_BCA).clone()

            return counted

        for stage in STAGES:
            policy.wrap_stage(stage, capture, "a captured graph of its own")
        policy.wrap_call(count, "replays counted, actions copied out of the graphs")
        policy.count_with(tally.counters)


class Owners:
    """Which function's graphs write which memory: address of a storage -> the function."""

    def __init__(self) -> None:
        self._of: dict[int, CapturedFunction] = {}

    def add(self, owner: "CapturedFunction", tensors: list[Tensor]) -> None:
        for tensor in tensors:  # what a function passes through stays with the one that computes it
            self._of.setdefault(tensor.untyped_storage().data_ptr(), owner)

    def remove(self, owner: "CapturedFunction", tensors: list[Tensor]) -> None:
        for tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            if self._of.get(address) is owner:
                del self._of[address]

    def other_than(self, reader: "CapturedFunction", tensor: Tensor) -> bool:
        """Whether a graph of another function writes this tensor."""
        return self._of.get(tensor.untyped_storage().data_ptr(), reader) is not reader


class CapturedFunction:
    """`function`, replayed from graphs keyed by the structure, shapes and constants of its arguments.

    What another captured function computed is read where it stands, so that keys and values are not copied in every
    step; its address is then part of the key. A function's own output is always copied: reading it in place would need
    another graph for each step.
    """

    def __init__(
        self, function: Callable[..., Any], warmup: int, max_graphs: int, tally: Tally, owners: Owners, note: Note
    ) -> None:
        self.function, self.warmup, self.tally, self.owners, self.note = function, warmup, tally, owners, note
        self.recordings = Recordings(max_graphs, tally, self._forget)

    def __call__(self, *args: Any) -> Any:
        if bypassed():
            return self.function(*args)
        leaves, structure = tree_flatten(args)
        given = tensors_of(leaves)
        in_place = frozenset(i for i, tensor in enumerate(given) if self.owners.other_than(self, tensor))
        constants = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        where = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        forms = tuple(_form(tensor, i in in_place) for i, tensor in enumerate(given))

        def run(inputs: list[Tensor]) -> tuple[list[Any], Any]:
            replaced = list(leaves)
            for i, tensor in zip(where, inputs, strict=True):
                replaced[i] = tensor
            return tree_flatten(self.function(*tree_unflatten(replaced, structure)))

        key = (structure, where, constants, forms)
        recording = self.recordings.get(key, lambda: self._record(run, given, in_place))
        recording.replay(given)
        self.tally.replayed(recording)
        return tree_unflatten(*recording.output)

    def _record(self, run: Callable[[list[Tensor]], Any], given: list[Tensor], in_place: frozenset[int]) -> Recording:
        recording = Recording(run, given, in_place, self.warmup, self.note)
        self.owners.add(self, tensors_of(recording.output[0]))
        return recording

    def _forget(self, recording: Recording) -> None:
        self.owners.remove(self, tensors_of(recording.output[0]))


def tensors_of(leaves: list[Any]) -> list[Tensor]:
    """The tensors among the leaves. Raises TypeError for an object that may hold tensors out of sight."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise TypeError(f"graphs=split cannot capture a stage that takes or returns a {type(leaf).__name__}")
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _form(tensor: Tensor, in_place: bool) -> tuple[Any, ...]:
    """What a graph depends on: shape and dtype; of what is read in place also address and strides."""
    form = (tuple(tensor.shape), tensor.dtype, tensor.device)
    return (*form, tensor.data_ptr(), tensor.stride()) if in_place else form
