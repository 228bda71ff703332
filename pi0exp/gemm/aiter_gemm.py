"""Matrix products by AMD's aiter. Not run on AMD hardware; held to recorded signatures by `tests/test_aiter_gemm.py`.

aiter has a kernel for a shape where a table says so. For a shape without a row it calls PyTorch's own product, with a
line in a log as the only sign; here each shape is looked up before its first product, and the answer is noted and
counted, or refused with `strict`. `pi0exp/gemm/tables/README.md` tells how to make a table.

Names of kernels prove nothing: those of hipBLASLt are the same whoever calls it. What stands in `applied` is aiter's
own answer for each shape, and it must be the row that the table has.

Sizes: a product of activations [M, K] with a weight [N, K].
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pi0exp import aiter
from pi0exp.compile_mode.none import NoCompile
from pi0exp.errors import UnsupportedError
from pi0exp.gemm.tuned_table import TunedProducts
from pi0exp.machine import Machine
from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.option import Numerics, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

SHIPPED = Path(__file__).parent / "tables" / "pi0_tuned.csv"


@dataclass(frozen=True)
class AiterGemm(StagedOption):
    """`aiter.tuned_gemm.gemm_a16w16` for the bf16 weights; those of float32 stay with BLAS.

    table: a tuned CSV, the same for all stages; None is the shipped one, which has no rows.
    preshuffle: put the weights in the order that aiter's shuffled kernels read. Whatever else reads a weight directly
        then computes nonsense, which the verification finds.
    strict: a shape without a row is an error.
    """

    requires = aiter.INSTINCT
    numerics = Numerics.REORDERED

    table: str | None = None
    preshuffle: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.table is not None and os.pathsep in self.table:
            raise ValueError(f"table is {self.table!r}; it must be one file")

    @property
    def path(self) -> Path:
        return SHIPPED if self.table is None else Path(self.table).resolve()

    def files(self) -> list[str]:
        """The table, and beside it the file that tells which build its rows are for; the shipped ones are code."""
        if self.table is None:
            return []
        sidecar = Path(self.table).with_suffix(".json")
        return [self.table, *([str(sidecar)] if sidecar.is_file() else [])]

    def unmet(self, machine: Machine) -> list[str]:
        return super().unmet(machine) + aiter.unmet_package()

    def clashes(self, stack: "Stack") -> list[str]:
        reasons = []
        others = [part for _, part in stack.gemm.parts() if isinstance(part, AiterGemm) and part.path != self.path]
        if others:
            reasons.append(f"aiter reads one table a process, not {self.path} and {others[0].path}")
        if self.preshuffle and not all(isinstance(mode, NoCompile) for _, mode in stack.compile_mode.parts()):
            reasons.append(
                "preshuffle=true needs compile_mode=none: a shuffled weight is marked by an attribute of the Python"
                " object, which compiled code need not pass on"
            )
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations != torch.bfloat16:
            reasons.append("aiter's products here are of bf16; this precision has none")
        return reasons

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        gemm, gpu = aiter.gemm_module(self.path), aiter.aiter_gpu(policy.device)
        products = TunedProducts(self.path, gpu, aiter.blas_versions())
        policy.note(f"{aiter.described()} on {gpu}; {self.path.name} has {len(products.rows)} rows for it")
        lines = policy.applied.setdefault("gemm", [])
        for stage in stages:
            choices = Choices(stage, gemm.get_GEMM_A16W16_config, products, gpu, self.preshuffle, self.strict, lines)
            self._fill(policy, stage, matmul_by(gemm.gemm_a16w16, choices.settle))
            policy.count_with(choices.counters)
        if self.table is not None:
            text = self.path.read_text()
            policy.attach_with(lambda: {self.path.name: text})

    def _fill(self, policy: Policy, stage: str, matmul: MatmulFn) -> None:
        """Set the slots of the stage's bf16 weights, and shuffle these if that is wanted."""
        names = {module: name for name, module in policy.model.named_modules()}

        def fill(module: Linear) -> MatmulFn | None:
            if module.weight.dtype != torch.bfloat16:
                return None
            if self.preshuffle:
                shuffle(module, names[module])
            return matmul

        policy.fill_each(Linear, "matmul", fill, (stage,), "gemm_a16w16 of aiter")
        if left := sum(module.weight.dtype != torch.bfloat16 for module in policy.instances(Linear, stage)):
            policy.note(f"{stage}: {left} Linear that are not of bf16 stay with BLAS")


def matmul_by(gemm_a16w16: Callable[..., Tensor], settle: Callable[[int, int, int, bool], bool]) -> MatmulFn:
    """The slot `matmul`: a product whose shape is settled before."""
    # A compiler calls it once for each shape and keeps the result; what it writes down is no part of the graph.
    settled = torch.compiler.assume_constant_result(lambda m, n, k, bias: settle(m, n, k, bias))

    def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out_width, in_width = weight.shape
        settled(x.numel() // in_width, out_width, in_width, bias is not None)
        # aiter views activations as a matrix; where it cannot, it calls PyTorch's product without a word.
        return gemm_a16w16(x.contiguous(), weight, bias=bias)

    return matmul


def shuffle(module: Linear, name: str) -> None:
    """Put the weight in aiter's order of 16 x 16 tiles, in place of the plain one. Raises UnsupportedError."""
    out_width, in_width = module.weight.shape
    if out_width % 16 or in_width % 32:
        raise UnsupportedError(
            f"gemm.preshuffle: {name} is {out_width} x {in_width}; aiter shuffles weights of 16 n x 32 k:"
            " leave its stage to another gemm"
        )
    shuffled = import_module("aiter.ops.shuffle").shuffle_weight(module.weight.detach(), layout=(16, 16))
    weight: Any = nn.Parameter(shuffled, requires_grad=False)
    weight.is_shuffled = True  # aiter's mark, which the tensor has that it returned, but not the Parameter of it
    module.weight = weight


class Choices:
    """What aiter uses for each shape of a stage: looked up once, in the table and in aiter, and written down."""

    def __init__(
        self,
        stage: str,
        ask: Callable[..., dict[str, Any]],
        products: TunedProducts,
        gpu: aiter.Gpu,
        shuffled: bool,
        strict: bool,
        lines: list[str],
    ):
        self.stage, self.ask, self.products, self.gpu = stage, ask, products, gpu
        self.shuffled, self.strict, self.lines = shuffled, strict, lines
        self.tuned: dict[tuple[int, int, int, bool], bool] = {}
        self.places: dict[tuple[int, int, bool, str], tuple[int, list[int]]] = {}

    def settle(self, m: int, n: int, k: int, bias: bool) -> bool:
        """Whether a shape has a row. Raises UnsupportedError where `strict` wants one, or aiter answers another."""
        shape = (m, n, k, bias)
        if shape not in self.tuned:
            answer = self._answer(m, n, k, bias)
            place, rows = self.places.setdefault((n, k, bias, answer), (len(self.lines), []))
            if not rows:
                self.lines.append("")
            rows.append(m)
            what = f"{n} x {k}{' + bias' if bias else ''}"
            self.lines[place] = f"{self.stage}: {what}: {answer} for M {', '.join(map(str, sorted(rows)))}"
        return self.tuned[shape]

    def _answer(self, m: int, n: int, k: int, bias: bool) -> str:
        row = self.products.find(m, n, k, bias, self.shuffled)
        shape = f"M {m}, N {n}, K {k}{' with bias' if bias else ''}"
        if row is None and self.strict:
            raise UnsupportedError(f"gemm.strict: the table has no row for {shape} on {self.gpu}")
        if row is None and self.shuffled and self.gpu.gfx != "gfx942" and (n % 64 or k % 64):
            raise UnsupportedError(f"gemm.preshuffle: aiter has no kernel for {shape} without a row on {self.gpu}")
        kind = "torch.bfloat16"
        found = self.ask(M=m, N=n, K=k, bias=bias, dtype=kind, otype=kind, scaleAB=False, bpreshuffle=self.shuffled)
        if row is not None and (found["libtype"], _text(found.get("kernelName"))) != (row.library, row.kernel):
            raise UnsupportedError(
                f"the table has {row.library} {row.kernel} for {shape} (line {row.line}), but aiter answers"
                f" {found['libtype']} {_text(found.get('kernelName'))}"
            )
        self.tuned[m, n, k, bias] = row is not None
        return f"{row.library} {row.kernel}".strip() if row is not None else f"untuned ({found['libtype']})"

    def counters(self) -> dict[str, float]:
        tuned = sum(self.tuned.values())
        return {
            f"aiter/tuned_shapes_{self.stage}": float(tuned),
            f"aiter/untuned_shapes_{self.stage}": float(len(self.tuned) - tuned),
        }


def _text(cell: object) -> str:
    """A cell as aiter's reader has it: an empty one is a float there, not a number."""
    return cell if isinstance(cell, str) else ""
