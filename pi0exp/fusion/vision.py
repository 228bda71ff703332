"""Parts of the vision tower in fewer launches: patches as a matrix product or in one kernel, and GELU in a product's
epilogue.

Shapes: B pictures, H, W their sides, S patches along a side, P patches, D width, F hidden width.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pi0exp.model.observation import scaled_values
from pi0exp.model.siglip import Siglip, VisionMlp, placed
from pi0exp.policy import Policy

if TYPE_CHECKING:
    from pi0exp.config import Stack

EPILOGUE = "gelu_epilogue"
PROOF = r"(?i)gelu_?bias"
"""What the names of cuBLASLt's kernels with this epilogue contain."""


def patches_as_product(policy: Policy) -> None:
    """The slot `Siglip.embed_patches`: every patch a row, by one product in the convolution's own dtype."""
    vision = policy.model.vision
    vision.embed_patches = partial(patch_product, weight_DK=_by_patch(vision))
    policy.note("vision: the patch embedding is a matrix product")


def patches_by_kernel(policy: Policy) -> None:
    """The same slot: pictures of bytes by one Triton kernel, scaled ones as without it."""
    from pi0exp.kernels.patch_embed import prepare

    vision = policy.model.vision
    assert vision.patch.bias is not None
    parts_3KD, rest_PD = prepare(_by_patch(vision), vision.patch.bias, vision.position)
    others = vision.embed_patches
    vision.embed_patches = partial(patch_kernel, parts_3KD=parts_3KD, rest_PD=rest_PD, others=others)
    policy.note("vision: patches and positions of bytes -> Triton patch_embed")


def patch_kernel(
    vision: Siglip, image: Tensor, parts_3KD: Tensor, rest_PD: Tensor, others: Callable[[Siglip, Tensor], Tensor]
) -> Tensor:
    """[B, P, D]; see `kernels/patch_embed.py`. others: what embeds pictures that are scaled already."""
    from pi0exp.kernels.patch_embed import patch_embed

    if image.dtype != torch.uint8:
        return others(vision, image)
    size = vision.patch.kernel_size[0]
    placed_BPD: Tensor = patch_embed(image.contiguous(), parts_3KD, rest_PD, size, vision.norm.weight)
    return placed_BPD


def _by_patch(vision: Siglip) -> Tensor:
    """The weight of the convolution [D, K], in the order of a patch's values: row, column, colour."""
    return vision.patch.weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def patch_product(vision: Siglip, image: Tensor, weight_DK: Tensor) -> Tensor:
    """[B, P, D] of pictures as an observation has them: bytes [B, H, W, 3], or [B, 3, H, W] from -1 to 1.

    weight: of `_by_patch`.
    """
    size = vision.patch.kernel_size[0]
    side = image.shape[2] // size
    if image.dtype == torch.uint8:
        cut = image.reshape(-1, side, size, side, size * 3).transpose(2, 3)
        values = scaled_values(cut.to(torch.float32, memory_format=torch.contiguous_format))
    else:
        values = image.reshape(-1, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
    patches_BPK = values.to(weight_DK.dtype).reshape(image.shape[0], side * side, -1)
    return placed(vision, F.linear(patches_BPK, weight_DK, vision.patch.bias))


def clashes(stack: "Stack") -> list[str]:
    """Why the epilogue, which is cuBLASLt's, cannot stand beside other options."""
    from pi0exp.gemm.blas import Blas, Library
    from pi0exp.gemm.lt_tuned import LtTuned
    from pi0exp.precision.fp8 import Fp8
    from pi0exp.precision.fp32 import Fp32

    reasons = []
    gemm = stack.gemm.at("vision")
    by_lt = isinstance(gemm, Blas) and gemm.library in (Library.auto, Library.cublaslt) and gemm.addmm_lt
    if not (by_lt or isinstance(gemm, LtTuned)):
        reasons.append(f"{EPILOGUE} is cuBLASLt's: gemm.vision must be blas or cublaslt, with addmm_lt, or lt_tuned")
    if isinstance(stack.precision, Fp8) and "vision" in stack.precision.stages():
        reasons.append(f"{EPILOGUE} has no fp8: precision=fp8 must keep vision in bf16 (precision.keep=[vision])")
    if isinstance(stack.precision, Fp32):
        reasons.append(f"{EPILOGUE} is no float32: four times its error was measured; precision must not be fp32")
    return reasons


def gelu_epilogue(policy: Policy) -> None:
    """The slot `VisionMlp.hidden`: bias and GELU before the product is rounded, in its own launch."""
    policy.fill(VisionMlp, "hidden", hidden, ("vision",), "product with bias and GELU in one launch")


def hidden(mlp: VisionMlp, x_BPD: Tensor) -> Tensor:
    """[B, P, F]. cuBLASLt's GELU is the one by tanh, as SigLIP's."""
    given = mlp.fc1.bias, x_BPD.flatten(0, 1), mlp.fc1.weight
    made = product_with_gelu(*given) if torch.compiler.is_compiling() else _product_with_gelu(*given)
    return made.view(*x_BPD.shape[:2], -1)


def _product_with_gelu(bias_F: Tensor, x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """[R, F]."""
    made: Tensor = torch._addmm_activation(bias_F, x_RD, weight_FD.t(), use_gelu=True)
    return made


# A compiler would take PyTorch's function apart, into a product and a GELU behind it.
product_with_gelu = torch.library.custom_op("pi0exp::product_with_gelu", _product_with_gelu, mutates_args=())


@product_with_gelu.register_fake
def _(bias_F: Tensor, x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    return x_RD.new_empty((x_RD.shape[0], weight_FD.shape[0]))
