"""A graph for calls that begin and end on the host: its inputs lie one behind the other, and one copy brings them.

On the host they are gathered in pinned memory, which the device reads by itself. A copy of each tensor from memory that
is not pinned costs tens of microseconds, and a call has about eleven.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pi0exp.graphs import capture
from pi0exp.graphs.capture import Note

_WORD = 8
"""Bytes of torch.int64."""
_ALIGNMENT = 256
"""Bytes. That of PyTorch's allocator on the device, so that packed tensors are read in pieces as wide as others."""


class Packed:
    """Contiguous tensors of the shapes and types of `like`, one behind the other in `buffer`."""

    def __init__(self, like: Sequence[Tensor], device: torch.device, pinned: bool = False) -> None:
        sizes = [tensor.numel() * tensor.element_size() for tensor in like]
        *starts, total = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
        self.buffer = torch.zeros(total, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors = [
            self.buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(starts, sizes, like, strict=True)
        ]
        # One launch copies tensors of one type, and reads as much at a time as its type is wide.
        self._wide = [
            own.view(-1).view(torch.uint8 if size % _WORD else torch.int64)
            for size, own in zip(sizes, self.tensors, strict=True)
        ]

    def fill(self, given: Sequence[Tensor]) -> None:
        """Copy tensors of these shapes into place one by one, which on the host is the fastest way."""
        for own, tensor in zip(self.tensors, given, strict=True):
            own.copy_(tensor)

    def fill_at_once(self, given: Sequence[Tensor]) -> None:
        """The same on a device: in two launches, but for those whose bytes stand otherwise."""
        launches: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for own, wide, tensor in zip(self.tensors, self._wide, given, strict=True):
            aligned = tensor.storage_offset() * tensor.element_size() % wide.element_size() == 0
            if not (aligned and tensor.is_contiguous() and tensor.dtype == own.dtype):
                own.copy_(tensor)
            elif tensor.numel():
                owns, tensors = launches.setdefault(wide.dtype, ([], []))
                owns.append(wide)
                tensors.append(tensor.view(-1).view(wide.dtype))
        for owns, tensors in launches.values():
            torch._foreach_copy_(owns, tensors)


class StagedRecording:
    """`run` of tensors as `given` as one graph, replayed for tensors on the device or on the host.

    output: what `run` returned, a tensor; each replay writes it anew.
    """

    def __init__(
        self,
        run: Callable[[list[Tensor]], Tensor],
        given: Sequence[Tensor],
        device: torch.device,
        warmup: int,
        note: Note,
    ) -> None:
        # Inference tensors if they are such: Dynamo compiles the kinds apart.
        with torch.inference_mode(any(tensor.is_inference() for tensor in given)):
            self._inputs = Packed(given, device)
            self._inputs.fill(given)
        self.graph = capture.Graph(lambda: run(self._inputs.tensors), warmup, note)
        self._staged: tuple[Packed, Tensor] | None = None

    @property
    def output(self) -> Tensor:
        made: Tensor = self.graph.output
        return made

    def replay(self, given: Sequence[Tensor]) -> None:
        self._inputs.fill_at_once(given)
        self.graph.replay()

    def replay_from_host(self, given: Sequence[Tensor]) -> Tensor:
        """The output on the host, for tensors on the host."""
        device, on_gpu = self._inputs.buffer.device, self._inputs.buffer.is_cuda
        if self._staged is None:
            host = torch.device("cpu")
            self._staged = Packed(given, host, on_gpu), torch.empty_like(self.output, device=host, pin_memory=on_gpu)
        inputs, output = self._staged
        inputs.fill(given)
        self._inputs.buffer.copy_(inputs.buffer, non_blocking=True)
        self.graph.replay()
        output.copy_(self.output, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return output.clone()  # the next call overwrites it
