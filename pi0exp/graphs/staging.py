"""A graph whose inputs come to it by their addresses: nothing is launched in front of it.

On a GPU its first kernel gathers the inputs (`pi0exp.kernels.gather`), from the device or, for calls that begin on the
host, from pinned memory. Elsewhere they are copied.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pi0exp.graphs import capture
from pi0exp.graphs.capture import Note

_ALIGNMENT = 256
"""Bytes. That of PyTorch's allocator on the device, so that packed tensors are read in pieces as wide as others."""


class Packed:
    """Contiguous tensors of the shapes and types of `like`, one behind the other in `buffer`. starts, sizes: bytes."""

    def __init__(self, like: Sequence[Tensor], device: torch.device, pinned: bool = False) -> None:
        self.sizes = [tensor.numel() * tensor.element_size() for tensor in like]
        *self.starts, total = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in self.sizes), initial=0)
        self.buffer = torch.zeros(total, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors = [
            self.buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(self.starts, self.sizes, like, strict=True)
        ]

    def fill(self, given: Sequence[Tensor]) -> None:
        """Copy tensors of these shapes into place one by one."""
        on_host = self.buffer.is_cpu
        for own, tensor, size in zip(self.tensors, given, self.sizes, strict=True):
            alike = tensor.dtype == own.dtype and tensor.shape == own.shape and tensor.is_contiguous()
            if on_host and tensor.is_cpu and alike:
                # PyTorch would share a picture among threads, and waking them takes longer than to copy it.
                ctypes.memmove(own.data_ptr(), tensor.data_ptr(), size)
            else:
                own.copy_(tensor)


class Addresses:
    """Tells a graph where its next inputs are, through pinned memory; `gather` is its first kernel.

    Read before it is written anew: a call whose predecessor has not been gathered yet waits for that.
    """

    def __init__(self, inputs: Packed) -> None:
        places = list(zip(inputs.starts, inputs.sizes, strict=True))
        self._inputs, device = inputs, inputs.buffer.device
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._table, self._mail = (torch.zeros(n, dtype=torch.int64).pin_memory() for n in (len(places), 2))
        self._host_table, self._host_mail = self._table.numpy(), self._mail.numpy()
        self._sent = 0
        self._given: list[Tensor] = []

    def gather(self) -> None:
        from pi0exp.kernels.gather import gather

        gather(self._table, self._places, self._inputs.buffer, self._mail, max(self._inputs.sizes))

    def write(self, given: Sequence[Tensor]) -> None:
        """The inputs of the next replay: tensors of these shapes that the device can read. They are held until then."""
        formed = [
            tensor if tensor.dtype == own.dtype and tensor.is_contiguous() else tensor.to(own.dtype).contiguous()
            for own, tensor in zip(self._inputs.tensors, given, strict=True)
        ]
        self.wait()
        self._host_table[:] = [tensor.data_ptr() for tensor in formed]
        self._sent += 1
        self._host_mail[0] = self._sent
        self._given = formed

    def start_over(self) -> None:
        """After a replay that may not have been launched: what was gathered counts, nobody reads the rest any more."""
        torch.cuda.current_stream(self._inputs.buffer.device).synchronize()
        self._sent = int(self._host_mail[1])

    def wait(self) -> None:
        """Until the inputs of all replays have been gathered. Raises whatever error the device is in."""
        while self._host_mail[1] != self._sent:
            torch.cuda.current_stream(self._inputs.buffer.device).query()


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
        self._addresses = Addresses(self._inputs) if self._inputs.buffer.is_cuda else None
        self._staged: tuple[Packed, Tensor] | None = None

        def gathered() -> Tensor:
            if self._addresses is not None:
                self._addresses.gather()
            return run(self._inputs.tensors)

        self._point_to(self._inputs.tensors)  # for warm-up and the replays that are timed
        self.graph = capture.Graph(gathered, warmup, note)

    @property
    def output(self) -> Tensor:
        made: Tensor = self.graph.output
        return made

    def _point_to(self, given: Sequence[Tensor]) -> None:
        if self._addresses is not None:
            self._addresses.write(given)
        elif given is not self._inputs.tensors:
            self._inputs.fill(given)

    def replay(self, given: Sequence[Tensor]) -> None:
        try:
            self._point_to(given)
            self.graph.replay()
        except BaseException:  # also Ctrl-C: the next call would wait for a replay that never came
            if self._addresses is not None:
                self._addresses.start_over()
            raise

    def replay_from_host(self, given: Sequence[Tensor]) -> Tensor:
        """The output on the host, for tensors on the host."""
        device, on_gpu = self._inputs.buffer.device, self._inputs.buffer.is_cuda
        if self._staged is None:
            host = torch.device("cpu")
            self._staged = Packed(given, host, on_gpu), torch.empty_like(self.output, device=host, pin_memory=on_gpu)
        inputs, output = self._staged
        inputs.fill(given)  # nobody reads it any more: this function returns when all is done
        self.replay(inputs.tensors)
        output.copy_(self.output, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return output.clone()  # the next call overwrites it
