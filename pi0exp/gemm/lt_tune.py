"""Choose cuBLASLt's algorithms for Pi0's products on this GPU:  python -m pi0exp.gemm.lt_tune [--out FILE]

The products of vision and of the prefill, weights of a layer in one matrix as `fusion.qkv` and `fusion.gate_up` have
them, for one to three cameras and each length of prompt; see `pi0exp.gemm.lt_search` for how. About a second a shape.

It writes tables/cublaslt_<architecture>.json beside this file, which `gemm=lt_tuned` reads: for each shape the
algorithm, and as evidence what it took, what the first suggestion took, and how many were tried.

Exit codes: 0; 2 a wrong word; 3 no NVIDIA GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from pi0exp import cublaslt, pipes
from pi0exp.gemm.lt_search import Found, Shape, fastest, layers_in_turns
from pi0exp.gemm.lt_table import LtTable, shipped
from pi0exp.gpu_lock import taken_here
from pi0exp.machine import Machine, this_machine
from pi0exp.model.config import CAMERAS, ModelConfig
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.whole import write_whole

PROMPTS = (20, 200)
"""Of the workloads `default` and `pi05`."""
LAYERS = 27


def shapes(prompts: Sequence[int], config: ModelConfig) -> list[Shape]:
    """Of a call with one observation, each once."""
    vision, gemma = config.vision, config.paligemma
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    of_vision = (
        (3 * vision.width, vision.width),
        (vision.width, vision.width),
        (vision.mlp_dim, vision.width),
        (vision.width, vision.mlp_dim),
        (gemma.width, vision.width),
    )
    of_prefill = (
        (heads + keys, gemma.width),
        (keys, gemma.width),
        (gemma.width, heads),
        (2 * gemma.mlp_dim, gemma.width),
        (gemma.width, gemma.mlp_dim),
    )
    found = []
    for cameras in range(1, len(CAMERAS) + 1):
        rows = cameras * vision.num_patches
        found += [Shape(rows, n, k, True) for n, k in of_vision]
        for prompt in prompts:
            found += [Shape(rows + prompt, n, k, False) for n, k in of_prefill]
    return list(dict.fromkeys(found))


def operands(shape: Shape, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Random ones: x, weights of several layers, and the bias."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    layers = min(LAYERS, layers_in_turns(shape.N, shape.K))
    x = normal(shape.M, shape.K).bfloat16()
    weights = [(normal(shape.N, shape.K) * shape.K**-0.5).bfloat16() for _ in range(layers)]
    return x, weights, normal(shape.N).bfloat16() if shape.bias else None


def tune(prompts: Sequence[int], machine: Machine) -> LtTable:
    device = torch.device("cuda", 0)
    rows = dict[Shape, Found]()
    for shape in shapes(prompts, ModelConfig()):
        found = rows[shape] = fastest(*operands(shape, device))
        print(f"{shape}: {found.us:.2f} us, the first suggestion {found.first_us:.2f}; {found.tried} tried", flush=True)
    about = {
        "gpu": machine.gpu,
        "driver": machine.driver,
        "torch": machine.versions.get("torch", ""),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(sys.orig_argv[1:]),
    }
    return LtTable(machine.arch, cublaslt.version(), about, rows)


def main(words: list[str]) -> int:
    title, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.gemm.lt_tune", description=title, epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, nargs="+", metavar="TOKENS", default=list(PROMPTS),
                        help=f"lengths of prompts; default: {' '.join(map(str, PROMPTS))}")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes; default: the one that is read")
    given = parser.parse_args(words)
    if any(prompt < 0 for prompt in given.prompts):
        parser.error("--prompts: a length is 0 or more")
    machine = this_machine()
    if machine.vendor != "nvidia":
        print(f"{parser.prog}: needs a GPU of NVIDIA's; this machine has {machine.gpu}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    out = given.out or shipped(machine.arch)
    if not out.absolute().parent.is_dir():
        print(f"{parser.prog}: --out {out}: its folder does not exist", file=sys.stderr)
        return CONFIG_ERROR
    with taken_here(True, lambda text: print(text, file=sys.stderr, flush=True)):
        write_whole(out, tune(given.prompts, machine).text().encode())
    print(f"written to {out}")
    return Outcome.OK.exit_code


if __name__ == "__main__":
    pipes.leave(lambda: main(sys.argv[1:]))
