"""Matrix products of many rows whose tiles are too few for the GPU, by `pi0exp.kernels.stream_k_gemm`.

Made for SigLIP's: `gemm.vision=stream_k`. It has not run on a GPU yet (experiments/speed.md). Shapes: B pictures, P
patches, F hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.model.siglip import VisionMlp, plain_hidden
from pi0exp.option import Numerics, Requires, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack


@dataclass(frozen=True)
class StreamKGemm(StagedOption):
    """Products of bf16 weights, each program with the same share of all steps of K; others stay with BLAS.

    activation: vision's GELU in the product before it. min_rows: products of fewer rows stay with BLAS.
    """

    requires = Requires(vendors=("nvidia",), archs=("sm_90",))
    numerics = Numerics.REORDERED

    activation: bool = True
    min_rows: int = 256

    def __post_init__(self) -> None:
        if self.min_rows < 1:
            raise ValueError(f"min_rows is {self.min_rows}; it must be 1 or more")

    def proof(self) -> str:
        return r"^stream_k_gemm_kernel"

    def clashes(self, stack: "Stack") -> list[str]:
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations == torch.float32:
            return ["stream_k has no products of float32, and this precision has no others"]
        return []

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        products = Products(policy.device, self.min_rows)

        def matmul_of(linear: Linear) -> MatmulFn | None:
            return products.matmul if products.takes(linear.weight) else None

        policy.fill_each(Linear, "matmul", matmul_of, stages, f"stream-K from {self.min_rows} rows on")
        for stage in stages:
            if left := sum(not products.takes(one.weight) for one in policy.instances(Linear, stage)):
                policy.note(f"{stage}: {left} Linear, of float32 or of a K that 8 does not divide, stay with BLAS")
            if self.activation and stage == "vision":
                policy.fill_each(VisionMlp, "hidden", products.hidden_of, (stage,), "stream-K, GELU in the product")


class Products:
    """The functions of the slots, which share what the programs of a product leave to one another."""

    def __init__(self, device: torch.device, min_rows: int):
        from pi0exp.kernels.stream_k_gemm import BM, BN

        self.min_rows = min_rows
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        self.parts = torch.zeros(programs, BM, BN, device=device)
        self.flags = torch.zeros(programs, dtype=torch.int32, device=device)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.dtype is torch.bfloat16 and weight.shape[1] % 8 == 0

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """See `pi0exp.kernels.stream_k_gemm`."""
        from pi0exp.kernels.stream_k_gemm import stream_k_gemm

        made: Tensor = stream_k_gemm(x, weight, self.parts, self.flags, bias, None, activation)
        return made

    def enough(self, x: Tensor) -> bool:
        """Whether x has the rows for it."""
        return x.numel() >= self.min_rows * x.shape[-1]

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The slot `Linear.matmul`."""
        return self.product(x, weight, bias, "none") if self.enough(x) else F.linear(x, weight, bias)

    def hidden_of(self, mlp: VisionMlp) -> Callable[[VisionMlp, Tensor], Tensor] | None:
        """The slot `VisionMlp.hidden`, of those whose first matrix is one for it."""
        return self.hidden if self.takes(mlp.fc1.weight) else None

    def hidden(self, mlp: VisionMlp, x_BPD: Tensor) -> Tensor:
        """[B, P, F]."""
        if not self.enough(x_BPD):
            return plain_hidden(mlp, x_BPD)
        return self.product(x_BPD, mlp.fc1.weight, mlp.fc1.bias, "gelu_tanh")
