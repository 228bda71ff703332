"""Matrix products by the Triton kernels of `pi0exp.kernels`: one for few rows, one for many.

Sizes: x [..., K], weight [N, K]; rows are all leading axes of x together. Shapes: B batch, T tokens, D width, F hidden
width of an MLP, E width into a branch's output matrix.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pi0exp.model.gemma import GemmaBlock
from pi0exp.model.layers import Branch, GatedMlp, Linear, MatmulFn
from pi0exp.model.siglip import VisionBlock, VisionMlp
from pi0exp.option import ANY_GPU, Numerics, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

MAX_SKINNY_ROWS = 64
"""What `skinny_gemm` can do."""


@dataclass(frozen=True)
class TritonGemm(StagedOption):
    """Products of bf16 weights by Triton; the few of float32, around the transformers, stay with BLAS.

    activation: GELU and gated GELU in the product before them. Gemma's needs `fusion.gate_up`, and not
        `fusion.activation`, which computes the same in a kernel of its own.
    residual: the residual sum, with the gate of adaptive norms, in the product that ends a branch.
    max_skinny_rows: rows up to which the kernel for few rows is taken, 0 to 64.
    """

    requires = ANY_GPU
    numerics = Numerics.REORDERED

    activation: bool = False
    residual: bool = False
    max_skinny_rows: int = MAX_SKINNY_ROWS

    def __post_init__(self) -> None:
        if not 0 <= self.max_skinny_rows <= MAX_SKINNY_ROWS:
            raise ValueError(f"max_skinny_rows is {self.max_skinny_rows}; it must be 0 to {MAX_SKINNY_ROWS}")

    def proof(self) -> str:
        return r"^(tile|skinny)_gemm_kernel"

    def clashes(self, stack: "Stack") -> list[str]:
        reasons = []
        if self.activation and any(stack.gemm.at(stage) is self for stage in ("prefill", "denoise")):
            if not getattr(stack.fusion, "gate_up", False):
                reasons.append("activation needs fusion.gate_up")
            if getattr(stack.fusion, "activation", False):
                reasons.append("activation and fusion.activation compute the same; switch one of them off")
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations == torch.float32:
            reasons.append("products of float32 stay with BLAS, and this precision has no others")
        return reasons

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        products = Products(policy.device, self.max_skinny_rows)

        def matmul_of(linear: Linear) -> MatmulFn | None:
            return None if linear.weight.dtype == torch.float32 else products.matmul

        policy.fill_each(Linear, "matmul", matmul_of, stages, "Triton")
        for stage in stages:
            left = [one for one in policy.instances(Linear, stage) if one.weight.dtype == torch.float32]
            if left:
                policy.note(f"{stage}: {len(left)} Linear of float32 stay with BLAS")
            vision = stage == "vision"
            if self.activation and vision:
                policy.fill(VisionMlp, "hidden", products.vision_hidden, (stage,), "Triton, GELU in the product")
            elif self.activation:
                policy.fill(GatedMlp, "hidden", products.gated_hidden, (stage,), "Triton, gated GELU in the product")
            if self.residual:
                block = VisionBlock if vision else GemmaBlock
                policy.fill(block, "join", products.join, (stage,), "Triton, residual sum in the product")


class Products:
    """The functions of the slots, which share one set of the counters that `skinny_gemm` leaves as it finds them."""

    def __init__(self, device: torch.device, max_skinny_rows: int):
        from pi0exp.kernels.skinny_gemm import COUNTERS

        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.max_skinny_rows = max_skinny_rows

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        activation: str = "none",
        gated: bool = False,
    ) -> Tensor:
        """See `pi0exp.kernels.gemm`."""
        from pi0exp.kernels.gemm import gemm
        from pi0exp.kernels.skinny_gemm import skinny_gemm

        after = (bias, residual, scale, activation, gated)
        if x.numel() <= self.max_skinny_rows * x.shape[-1]:
            few: Tensor = skinny_gemm(x, weight, self.counters, *after)
            return few
        many: Tensor = gemm(x, weight, *after)
        return many

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The slot `Linear.matmul`."""
        return self.product(x, weight, bias)

    def vision_hidden(self, mlp: VisionMlp, x_BPD: Tensor) -> Tensor:
        """The slot `VisionMlp.hidden`: [B, P, F]."""
        return self.product(x_BPD, mlp.fc1.weight, mlp.fc1.bias, activation="gelu_tanh")

    def gated_hidden(self, mlp: GatedMlp, x_BTD: Tensor) -> Tensor:
        """The slot `GatedMlp.hidden`: [B, T, F]."""
        return self.product(x_BTD, mlp.gate_up.weight, None, activation="gelu_tanh", gated=True)

    def join(
        self, linear: nn.Module, hidden_BTE: Tensor, x_BTD: Tensor, gate_B1D: Tensor | None
    ) -> tuple[Tensor, Branch | None]:
        """The slot `join` of blocks: the sum, and no branch that were left to add."""
        assert isinstance(linear, Linear)
        gate_BD = None if gate_B1D is None else gate_B1D[:, 0].contiguous()
        # The patches come transposed out of their convolution; every later x is contiguous.
        residual_BTD = x_BTD.contiguous()
        return self.product(hidden_BTE, linear.weight, linear.bias, residual=residual_BTD, scale=gate_BD), None
