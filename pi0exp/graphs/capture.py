"""Capturing and replaying CUDA (HIP) graphs, and what it costs: what the options of this group share.

A graph reads and writes fixed addresses. Inputs are therefore copied into tensors of its own before each replay, unless
they already stand at an address that the graph was captured with; outputs are overwritten by the next replay.
"""

import ctypes
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pi0exp.option import ANY_GPU, Option

Note = Callable[[str], None]
Run = Callable[[list[Tensor]], Any]

_TIMED_REPLAYS = 10


@dataclass(frozen=True)
class Capture(Option):
    """What both granularities are told. Numerics: the same kernels on the same values, bitwise the same.

    warmup: runs before a capture, on a side stream; libraries pick algorithms and allocate workspaces in the first.
    max_graphs: how many structures are kept; beyond it the least recently used graph is dropped.
    Proof: the launch of a graph among the runtime calls of a profile.
    """

    requires = ANY_GPU
    warmup: int = 3
    max_graphs: int = 8

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it must be 1 or more")
        if self.max_graphs < 1:
            raise ValueError(f"max_graphs is {self.max_graphs}; it must be 1 or more")

    def proof(self) -> str:
        return r"(cuda|hip)GraphLaunch"


class Graph:
    """`run` as one graph. output: what it returned while it was captured; each replay writes it anew.

    nodes, kernels: how many nodes the graph has and how many of them are kernels; None where they cannot be counted.
    replay_us: host time of a replay call, which does not wait for the device; median of 10 with an idle device.
    """

    def __init__(self, run: Callable[[], Any], warmup: int, note: Note) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            self.output = run()
        self._graph.instantiate()
        self.nodes: int | None = None
        self.kernels: int | None = None
        try:
            self.nodes, self.kernels = count_nodes(self._graph.raw_cuda_graph())
        except RuntimeError as error:
            note(f"graphs/nodes and graphs/kernels are missing: {error}")
        self.replay_us = self._time_replay()

    def replay(self) -> None:
        self._graph.replay()

    def _time_replay(self) -> float:
        times = []
        for _ in range(_TIMED_REPLAYS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._graph.replay()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e6 * median(times)


class Recorded(Protocol):
    """A graph with its inputs, of whatever kind."""

    @property
    def graph(self) -> Graph: ...


R = TypeVar("R", bound=Recorded)


class Recording:
    """A graph with its inputs, each in a tensor of its own.

    run: computes from tensors of the shapes of `given`. in_place: indices of the inputs that are read where they are;
    whoever replays must give them at the same addresses.
    """

    def __init__(self, run: Run, given: Sequence[Tensor], in_place: frozenset[int], warmup: int, note: Note) -> None:
        # Copies, so that a later change of the caller's tensors cannot reach the graph.
        self.inputs = [tensor if i in in_place else same_kind(tensor) for i, tensor in enumerate(given)]
        self._copied = [i for i in range(len(given)) if i not in in_place]
        self.graph = Graph(lambda: run(self.inputs), warmup, note)

    @property
    def output(self) -> Any:
        return self.graph.output

    def replay(self, given: Sequence[Tensor]) -> None:
        for i in self._copied:
            self.inputs[i].copy_(given[i])
        self.graph.replay()


def same_kind(tensor: Tensor) -> Tensor:
    """A copy that is an inference tensor if and only if the tensor is one: Dynamo compiles the kinds apart."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.detach().clone()


_bypassed = False
"""Whether captured functions run as they are instead of being replayed."""


@contextmanager
def launched_one_by_one(watching: AbstractContextManager[None]) -> Iterator[None]:
    """Meanwhile whatever was captured runs kernel by kernel, inside `watching`: for a profiler, which sees of a replay
    neither operations nor stages."""
    global _bypassed
    _bypassed = True
    try:
        with watching:
            yield
    finally:
        _bypassed = False


def bypassed() -> bool:
    return _bypassed


class Tally:
    """What the graphs of one policy cost.

    graphs/captures, graphs/kept, graphs/evictions: how many. graphs/capture_s: seconds of warm-up, capture and the
    replays that are timed, which are part of the first call of a structure. Of the last call:
    graphs/replays_per_call, the nodes and kernels that its replays launched (graphs/nodes, graphs/kernels) and the
    host time of its replay calls in microseconds (graphs/replay_us; of one in the mean graphs/us_per_replay).
    """

    def __init__(self) -> None:
        self.captures = self.evictions = 0
        self.capture_s = 0.0
        self._replayed: list[Graph] = []

    def begin_call(self) -> None:
        self._replayed = []

    def replayed(self, recording: Recorded) -> None:
        self._replayed.append(recording.graph)

    def counters(self) -> dict[str, float]:
        values = {
            "graphs/captures": float(self.captures),
            "graphs/kept": float(self.captures - self.evictions),
            "graphs/evictions": float(self.evictions),
            "graphs/capture_s": self.capture_s,
            "graphs/replays_per_call": float(len(self._replayed)),
            "graphs/replay_us": sum(graph.replay_us for graph in self._replayed),
        }
        if self._replayed:
            values["graphs/us_per_replay"] = values["graphs/replay_us"] / len(self._replayed)
        nodes = [graph.nodes for graph in self._replayed if graph.nodes is not None]
        kernels = [graph.kernels for graph in self._replayed if graph.kernels is not None]
        if len(nodes) == len(self._replayed):
            values |= {"graphs/nodes": float(sum(nodes)), "graphs/kernels": float(sum(kernels))}
        return values


class Recordings(Generic[R]):
    """Recordings by key, at most `limit`; beyond it the least recently used one goes, after `forget` was told."""

    def __init__(self, limit: int, tally: Tally, forget: Callable[[R], None] = lambda recording: None) -> None:
        self.limit, self.tally, self.forget = limit, tally, forget
        self.kept: OrderedDict[Hashable, R] = OrderedDict()

    def get(self, key: Hashable, record: Callable[[], R]) -> R:
        """The recording for `key`, made by `record` where there is none."""
        if key not in self.kept:
            if len(self.kept) == self.limit:
                # Before the new one is made: its memory may be needed.
                self.forget(self.kept.popitem(last=False)[1])
                self.tally.evictions += 1
            start = time.perf_counter()
            self.kept[key] = record()
            self.tally.captures += 1
            self.tally.capture_s += time.perf_counter() - start
        self.kept.move_to_end(key)
        return self.kept[key]


_RUNTIMES = (("libcuda.so", "cuGraph"), ("libamdhip64.so", "hipGraph"))
"""Library -> how the names of its graph functions begin. CUDA's runtime and driver share their graphs."""
_KERNEL_NODE = 0
"""CU_GRAPH_NODE_TYPE_KERNEL and hipGraphNodeTypeKernel."""


def count_nodes(graph: int) -> tuple[int, int]:
    """Nodes of a captured graph and how many of them are kernels. Raises RuntimeError where they cannot be counted.

    graph: the address of a cudaGraph_t or hipGraph_t. Source of the calls: CUDA Driver API, cuGraphGetNodes and
    cuGraphNodeGetType; HIP's have the same form. Not run on AMD hardware.
    """
    library, prefix = _runtime()
    try:
        get_nodes, get_type = getattr(library, f"{prefix}GetNodes"), getattr(library, f"{prefix}NodeGetType")
    except AttributeError as error:
        raise RuntimeError(f"the GPU's library has no {error}") from error
    count, kind = ctypes.c_size_t(), ctypes.c_int()
    _check(get_nodes(ctypes.c_void_p(graph), None, ctypes.byref(count)))
    if not count.value:  # for room for none, the driver says that something is wrong
        return 0, 0
    nodes = (ctypes.c_void_p * count.value)()
    _check(get_nodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)))
    kernels = 0
    for node in nodes:
        _check(get_type(ctypes.c_void_p(node), ctypes.byref(kind)))
        kernels += kind.value == _KERNEL_NODE
    return len(nodes), kernels


def _runtime() -> tuple[Any, str]:
    """The library that this process has loaded for its GPU, and its prefix."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    for name, prefix in _RUNTIMES:
        for path in sorted(paths):
            if Path(path).name.startswith(name):
                return ctypes.CDLL(path), prefix
    raise RuntimeError(f"none of {', '.join(name for name, _ in _RUNTIMES)} is loaded")


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the GPU's library answered {status}")
