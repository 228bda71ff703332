"""Attention by Pi0's own Triton kernels, which honour every mask of the model in one pass.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pi0exp.errors import UnsupportedError
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import ANY_GPU, HOPPER, Numerics, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

HEAD_DIM = 256
"""Of Gemma's heads, for which `attend_halves` is made."""


@dataclass(frozen=True)
class TritonAttention(StagedOption):
    """`attend_dense` for the many rows of vision and prefill, `attend_split` for the few of a denoising step.

    two_groups: `attend_halves` in the prefill of one observation, of whose two warp groups each has every second block
        of keys. Written for Hopper; no GPU has run it yet.
    """

    requires = ANY_GPU
    numerics = Numerics.REORDERED

    two_groups: bool = False

    def proof(self) -> str:
        return "attend_halves_kernel" if self.two_groups else "attend_kernel"  # which all other ops launch

    def unmet(self, machine: Machine) -> list[str]:
        hopper = HOPPER.unmet(machine) if self.two_groups else []
        return super().unmet(machine) or [f"two_groups {reason}" for reason in hopper]

    def clashes(self, stack: "Stack") -> list[str]:
        if not self.two_groups:
            return []
        reasons = []
        if stack.attention.at("prefill") is not self:
            reasons.append("two_groups is the prefill's: set it for that stage")
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations != torch.bfloat16:
            reasons.append("two_groups is for bf16; this precision has none")
        return reasons

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        # Triton is there on Linux only; elsewhere the option must still be known, to be refused with its reason.
        from pi0exp.kernels.attention_dense import attend_dense
        from pi0exp.kernels.attention_split import attend_split

        for stage in stages:
            op, name = (attend_split, "attend_split") if stage == "denoise" else (attend_dense, "attend_dense")
            if stage == "prefill" and self.two_groups:
                config = policy.model.config
                if (config.num_kv_heads, config.head_dim) != (1, HEAD_DIM):
                    raise UnsupportedError(
                        f"attention.two_groups=true is for one key/value head of {HEAD_DIM};"
                        f" this model has {config.num_kv_heads} of {config.head_dim}"
                    )
                op, name = attend_by_batch, "attend_halves of one observation, attend_dense of more"
            policy.fill(Attention, "attend", partial(triton_attend, op=op), (stage,), f"Triton {name}")


def attend_by_batch(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """[B, T, N, H], by the kernel that is for such a batch."""
    from pi0exp.kernels.attention_dense import attend_dense
    from pi0exp.kernels.attention_halves import attend_halves

    op = attend_halves if q_BTNH.shape[0] == 1 else attend_dense
    mixed_BTNH: Tensor = op(q_BTNH.contiguous(), k_BSKH, v_BSKH, keys_BS, blind, scale)
    return mixed_BTNH


def triton_attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float, *, op: Callable[..., Tensor]
) -> Tensor:
    """The slot `attend`. Rows of padded queries see the real keys, not all keys; nothing ever reads them."""
    if mask is None:
        return op(q_BTNH, k_BSKH, v_BSKH, None, False, scale)
    assert not mask.causal, "image_masking=ignore refuses this attention beside steps=causal"
    keys_BS = None if mask.full else mask.keys_BS
    return op(q_BTNH, k_BSKH, v_BSKH, keys_BS, mask.blind, scale)
