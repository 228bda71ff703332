"""The whole device part of a call as one CUDA (HIP) graph: one launch instead of thousands.

One graph for each structure of the observation that comes by, captured on first sight. A graph is replayed only for
the structure it was captured for, since the device part depends on nothing else.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from pi0exp.model.observation import Observation, Structure
from pi0exp.option import ANY_GPU, Option
from pi0exp.policy import DeviceCall, Policy


@dataclass(frozen=True)
class Manual(Option):
    """Capture once, copy inputs into place, replay.

    warmup: runs before a capture, on a side stream; libraries pick algorithms and allocate workspaces in the first.
    max_graphs: how many structures are kept; beyond it the least recently used graph is dropped.
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

    def apply(self, policy: Policy) -> None:
        def capture(call: DeviceCall) -> DeviceCall:
            captured = CapturedCall(call, self.warmup, self.max_graphs)
            policy.count_with(captured.counters)
            return captured

        policy.wrap_call(capture, "one captured graph a structure")


class CapturedCall:
    """`call`, replayed from graphs keyed by the structure of the observation and the shape of the noise."""

    def __init__(self, call: DeviceCall, warmup: int, max_graphs: int):
        self.call, self.warmup, self.max_graphs = call, warmup, max_graphs
        self.graphs: OrderedDict[tuple[Structure, torch.Size], _Graph] = OrderedDict()
        self.captures = self.evictions = 0
        self.capture_s = 0.0

    def __call__(self, observation: Observation, noise_BCA: Tensor) -> Tensor:
        key = observation.structure, noise_BCA.shape
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) == self.max_graphs:
                self.graphs.popitem(last=False)
                self.evictions += 1
            start = time.perf_counter()
            graph = self.graphs[key] = _Graph(self.call, observation, noise_BCA, self.warmup)
            self.captures += 1
            self.capture_s += time.perf_counter() - start
        self.graphs.move_to_end(key)
        return graph.replay(observation, noise_BCA)

    def counters(self) -> dict[str, float]:
        return {
            "graphs/captures": float(self.captures),
            "graphs/kept": float(len(self.graphs)),
            "graphs/evictions": float(self.evictions),
            "graphs/capture_s": self.capture_s,
        }


class _Graph:
    """One captured call with its static inputs and output."""

    def __init__(self, call: DeviceCall, observation: Observation, noise_BCA: Tensor, warmup: int):
        # Copies, so that a later change of the caller's tensors cannot reach the graph.
        self.inputs = [tensor.clone() for tensor in [*observation.tensors(), noise_BCA]]
        static, noise = observation.with_tensors(self.inputs[:-1]), self.inputs[-1]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                call(static, noise)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = call(static, noise)

    def replay(self, observation: Observation, noise_BCA: Tensor) -> Tensor:
        for static, given in zip(self.inputs, [*observation.tensors(), noise_BCA], strict=True):
            static.copy_(given)
        self.graph.replay()
        # The next replay overwrites the output; what the caller holds must not change under it.
        return self.output.clone()
