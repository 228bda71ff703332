"""Attention by AMD's aiter. Not run on AMD hardware; held to recorded signatures by `tests/test_aiter.py`.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.

aiter takes [B, T, N, H] as Pi0 has it, fewer key/value heads than query heads and any H up to 256. It takes no mask per
row, so nothing may be masked: absent cameras and padding must be gone, and Pi0's state token, which may not see the
actions behind it, is an attention of its own.

In bf16 a head dim of 72 or 256 is computed by kernels generated from Composable Kernel, whose tiles have 128 queries.
They do not split the keys: when denoising, 8 heads give 8 workgroups on 256 compute units or more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pi0exp import aiter
from pi0exp.errors import UnsupportedError
from pi0exp.fusion.fusion import Fusion
from pi0exp.image_masking.ignore import Ignore
from pi0exp.image_masking.skip import Skip
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import STAGES, Numerics, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

_WAY_OUT = "needs image_masking=skip and fusion.rewrites.trim_prompt=true: aiter's attention takes no mask"


@dataclass(frozen=True)
class AiterAttention(StagedOption):
    """`aiter.flash_attn_func` on an Instinct GPU."""

    requires = aiter.INSTINCT
    numerics = Numerics.REORDERED

    def unmet(self, machine: Machine) -> list[str]:
        return super().unmet(machine) + aiter.unmet_package()

    def clashes(self, stack: "Stack") -> list[str]:
        reasons = []
        masked = [stage for stage in STAGES[1:] if stack.attention.at(stage) is self]
        trims = isinstance(stack.fusion, Fusion) and stack.fusion.rewrites.trim_prompt
        unmasked = isinstance(stack.image_masking, Ignore) or (isinstance(stack.image_masking, Skip) and trims)
        if masked and not unmasked:
            reasons.append(_WAY_OUT)
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations.itemsize != 2:
            reasons.append("aiter's attention takes bf16 and fp16 only")
        return reasons

    def proof(self) -> str:
        # The kernel as Composable Kernel names it, mangled or not; PyTorch's own attention on ROCm is attn_fwd.
        return "FmhaFwdKernel"

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        attend = partial(aiter_attend, flash_attn_func=aiter.attention_module().flash_attn_func)
        policy.fill(Attention, "attend", attend, stages, f"flash_attn_func of {aiter.described()}")


def aiter_attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: Mask | None,
    scale: float,
    *,
    flash_attn_func: Callable[..., Tensor],
) -> Tensor:
    """The slot `attend`. Raises UnsupportedError where keys are masked, such as rows of a batch that differ."""
    attend = partial(flash_attn_func, softmax_scale=scale)
    if mask is None or (mask.full and not mask.blind and not mask.causal):
        return attend(q=q_BTNH, k=k_BSKH, v=v_BSKH)
    if not mask.full or mask.causal:
        raise UnsupportedError(
            f"{_WAY_OUT}, and cameras and prompts that differ between the rows of a batch need another attention"
        )
    seen = k_BSKH.shape[1] - mask.num_queries + 1
    first_B1NH = attend(q=q_BTNH[:, :1], k=k_BSKH[:, :seen], v=v_BSKH[:, :seen])
    return torch.cat([first_B1NH, attend(q=q_BTNH[:, 1:], k=k_BSKH, v=v_BSKH)], dim=1)
