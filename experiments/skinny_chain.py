"""The matrix products of ten denoising steps as one dependent chain: cuBLAS against `kernels/skinny_gemm.py`.

python experiments/skinny_chain.py OUT.json

10 steps of 18 layers of (qkv, out, gate and up, down) with weights of their own, each reading what the one before it
wrote, in one CUDA graph. cuBLAS computes the products alone; ours add the gated GELU and the residual sums too. Rounds
take turns. Our chain is also compared, bit by bit over 20 replays, with itself launched without programmatic dependent
launch, and with float64 in its first layer. All values stay of order one. Milliseconds a chain; needs an H100 or H200.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0exp.kernels import skinny_gemm as skinny
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint

STEPS, LAYERS, ROUNDS = 10, 18, 15
SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}
SMALLER = {"out": 0.1, "down": 0.1}
"""Of what is added to the residual stream, so that 18 layers do not let it grow."""
Weights = dict[str, list[Tensor]]


def weights() -> Weights:
    made = {}
    for name, (rows, width) in SHAPES.items():
        scale = SMALLER.get(name, 1.0) * width**-0.5
        made[name] = [(scale * torch.randn(rows, width, device="cuda")).bfloat16() for _ in range(LAYERS)]
    return made


def cublas(x_MD: Tensor, w: Weights) -> Callable[[], Tensor]:
    def chain() -> Tensor:
        for _ in range(STEPS):
            x = x_MD
            for i in range(LAYERS):
                x = F.linear(F.linear(x, w["qkv"][i])[:, :2048], w["out"][i])
                x = F.linear(F.linear(x, w["gate_up"][i])[:, :4096], w["down"][i])
        return x

    return chain


def ours(x_MD: Tensor, w: Weights, counters: Tensor) -> Callable[[], Tensor]:
    def chain() -> Tensor:
        for _ in range(STEPS):
            x = x_MD
            for i in range(LAYERS):
                qkv = skinny.skinny_gemm(x, w["qkv"][i], counters)
                x = skinny.skinny_gemm(qkv[:, :2048], w["out"][i], counters, residual=x)
                hidden = skinny.skinny_gemm(x, w["gate_up"][i], counters, activation="gelu_tanh", gated=True)
                x = skinny.skinny_gemm(hidden, w["down"][i], counters, residual=x)
        return x

    return chain


class Graph:
    def __init__(self, chain: Callable[[], Tensor]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            chain()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = chain()

    def ms(self) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        elapsed: float = start.elapsed_time(stop)
        return elapsed


def first_layer_error(x_MD: Tensor, w: Weights, counters: Tensor) -> float:
    """Relative L2 error of the gated product of the first layer against float64."""
    weight = w["gate_up"][0]
    counted = skinny.skinny_gemm(x_MD, weight, counters, activation="gelu_tanh", gated=True)
    gate, up = F.linear(x_MD.double(), weight.double()).chunk(2, dim=-1)
    truth = F.gelu(gate, approximate="tanh") * up
    return ((counted.double() - truth).norm() / truth.norm()).item()


def main(target: str) -> int:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("skinny_chain: needs a Hopper GPU; there is none", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    w, counters = weights(), torch.zeros(skinny.COUNTERS, dtype=torch.int32, device="cuda")
    found: dict[str, object] = {"command": sys.argv, "fingerprint": fingerprint(this_machine())}
    for rows in (11, 51):
        x_MD = torch.randn(rows, 1024, device="cuda").bfloat16()
        graphs = {"cublas": Graph(cublas(x_MD, w)), "ours": Graph(ours(x_MD, w, counters))}
        plain = {shape: replace(launch, pdl=False) for shape, launch in skinny.LAUNCH.items()}
        with patch.dict(skinny.LAUNCH, plain):
            graphs["ours without dependent launch"] = Graph(ours(x_MD, w, counters))
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                samples[name].append(graph.ms())
        expected = graphs["ours without dependent launch"].out
        assert torch.isfinite(expected).all()
        same = 0
        for _ in range(20):
            graphs["ours"].out.zero_()
            graphs["ours"].ms()
            same += torch.equal(graphs["ours"].out, expected)
        ms = {name: median(values[2:]) for name, values in samples.items()}
        error = first_layer_error(x_MD, w, counters)
        facts = {"samples_ms": samples, "ms": ms, "same_of_20": same, "rel_l2": error}
        found[f"M={rows}"] = facts | {"speedup": ms["cublas"] / ms["ours"], "largest": expected.abs().max().item()}
        print(
            rows, {name: round(value, 3) for name, value in ms.items()}, f"{ms['cublas'] / ms['ours']:.2f} x,", end=" "
        )
        print(f"{same} of 20 replays bitwise the same, error {error:.1e}, largest value {expected.abs().max():.1f}")
    Path(target).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(str(__doc__))
    sys.exit(main(sys.argv[1]))
