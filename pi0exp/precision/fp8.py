"""Matrix products in float8 (e4m3): weights converted once, activations row by row while they are computed.

Shapes: M rows, D input columns, E output rows of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pi0exp.gemm.blas import Blas
from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.model.precision import BF16, BF16_TRUTH
from pi0exp.model.siglip import VisionBlock
from pi0exp.option import STAGES, Numerics, Requires
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = torch.finfo(torch.float32).tiny
"""In the place of the largest value of a row of zeros, whose scale would be 0 / 0."""
ALIGNED = 16
"""Both sizes of a weight must be multiples of it (cuBLASLt and CUTLASS, which torch._scaled_mm calls)."""


@dataclass(frozen=True)
class Fp8(PrecisionOption):
    """The bf16 policy with its transformers' products in float8: `torch._scaled_mm`, sums in float32.

    Weights get one float32 scale an output row, activations one a row, taken anew in each call. Norms, attention, the
    embeddings and the projections around the expert stay as in bf16.

    keep: stages whose weights stay in bf16. keep_vision_ends: the first and the last block of the vision tower do, as
    is usual for quantized vision transformers: their inputs have the widest range.

    Numerics: two operands with three bits of mantissa make an error of 3.4 % in each product; see `bound`.
    Proof: cuBLASLt's float8 kernels (nvjet_qq...), or CUTLASS's, whose names hold the type.
    Needs a GPU with e4m3fn products and a scale a row: of NVIDIA's from Ada on; AMD's gfx942 has another float8.
    """

    requires = Requires(vendors=("nvidia",), archs=("sm_89", "sm_90", "sm_100", "sm_103"))
    numerics = Numerics.APPROXIMATE
    bound = 0.2
    model = BF16
    truth = BF16_TRUTH

    keep: list[str] = field(default_factory=list)
    keep_vision_ends: bool = True

    def __post_init__(self) -> None:
        if unknown := [stage for stage in self.keep if stage not in STAGES]:
            raise ValueError(f"keep has {unknown[0]!r}; it may hold {', '.join(STAGES)}")
        if not self.stages():
            raise ValueError("keep holds all stages; choose precision=bf16")

    def stages(self) -> tuple[str, ...]:
        """The stages that are converted."""
        return tuple(stage for stage in STAGES if stage not in self.keep)

    def products(self) -> str:
        return "fp8"

    def proof(self) -> str:
        return r"nvjet_(sm\d+_)?qq|float_e4m3"

    def clashes(self, stack: Stack) -> list[str]:
        named = [(stage, stack.gemm.at(stage)) for stage in self.stages()]
        return [
            f"{stage}: gemm={type(option).__name__} multiplies bf16 weights; choose gemm=blas, or keep {stage} in bf16"
            for stage, option in named
            if not isinstance(option, Blas)
        ]

    def apply(self, policy: Policy) -> None:
        super().apply(policy)
        ends: set[nn.Module] = set()
        if self.keep_vision_ends:
            blocks = policy.instances(VisionBlock, "vision")
            ends = {module for block in (*blocks[:1], *blocks[-1:]) for module in block.modules()}
            if blocks and "vision" not in self.keep:
                policy.note("vision: the first and the last block stay in bf16")

        def convert(linear: Linear) -> MatmulFn | None:
            return None if linear in ends or linear.weight.dtype == torch.float32 else in_float8(linear)

        policy.fill_each(Linear, "matmul", convert, self.stages(), "float8 weights, torch._scaled_mm")


def in_float8(linear: Linear) -> MatmulFn:
    """Convert a weight in place, bf16 [E, D] to float8 with scales [E, 1] beside it; the product that goes with it.

    Raises ValueError for a size that the libraries cannot take.
    """
    if any(size % ALIGNED for size in linear.weight.shape):
        raise ValueError(f"precision=fp8: a weight of {list(linear.weight.shape)}; both must be multiples of {ALIGNED}")
    weight_ED, scale_E1 = quantized(linear.weight)
    linear.weight = nn.Parameter(weight_ED, requires_grad=False)
    linear.register_buffer("scale_E1", scale_E1)

    def matmul(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        x_MD, scale_M1 = quantized(x.flatten(0, -2))
        y_ME: Tensor = torch._scaled_mm(
            x_MD, weight_ED.t(), scale_a=scale_M1, scale_b=scale_E1.t(), bias=bias_E, out_dtype=x.dtype
        )
        return y_ME.view(*x.shape[:-1], weight_ED.shape[0])

    return matmul


def quantized(values_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its own scale: float8 [M, D], and the scales, float32 [M, 1], so that its largest value is 448."""
    wide_MD = values_MD.float()
    scale_M1 = wide_MD.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST * LARGEST) / LARGEST
    return (wide_MD / scale_M1).to(torch.float8_e4m3fn), scale_M1
