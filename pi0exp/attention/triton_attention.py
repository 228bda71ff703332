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
from pi0exp.option import ANY_GPU, Numerics, Requires, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

HOPPER = Requires(vendors=("nvidia",), archs=("sm_90",))
HEAD_DIM = 256
"""Of Gemma's heads, for which `attend_ahead` is made."""


@dataclass(frozen=True)
class TritonAttention(StagedOption):
    """`attend_dense` for the many rows of vision and prefill, `attend_split` for the few of a denoising step.

    overlap: in the prefill of one observation `attend_ahead`, whose scores of a block of keys are under way while those
        of the block before become probabilities. Written for Hopper; no GPU has run it yet.
    """

    requires = ANY_GPU
    numerics = Numerics.REORDERED

    overlap: bool = False

    def proof(self) -> str:
        return "attend_ahead_kernel" if self.overlap else "attend_kernel"  # which both other ops launch

    def unmet(self, machine: Machine) -> list[str]:
        hopper = [f"overlap {reason}" for reason in HOPPER.unmet(machine)] if self.overlap else []
        return super().unmet(machine) or hopper

    def clashes(self, stack: "Stack") -> list[str]:
        if not self.overlap:
            return []
        reasons = []
        if stack.attention.at("prefill") is not self:
            reasons.append("overlap is the prefill's: set it for that stage")
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations != torch.bfloat16:
            reasons.append("overlap is for bf16; this precision has none")
        return reasons

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        # Triton is there on Linux only; elsewhere the option must still be known, to be refused with its reason.
        from pi0exp.kernels.attention_dense import attend_dense
        from pi0exp.kernels.attention_split import attend_split

        for stage in stages:
            op, name = (attend_split, "attend_split") if stage == "denoise" else (attend_dense, "attend_dense")
            if stage == "prefill" and self.overlap:
                config = policy.model.config
                if (config.num_kv_heads, config.head_dim) != (1, HEAD_DIM):
                    raise UnsupportedError(
                        f"attention.overlap is for one key/value head of {HEAD_DIM};"
                        f" this model has {config.num_kv_heads} of {config.head_dim}"
                    )
                op, name = attend_overlapped, "attend_ahead of one observation, attend_dense of more"
            policy.fill(Attention, "attend", partial(triton_attend, op=op), (stage,), f"Triton {name}")


def attend_overlapped(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """[B, T, N, H], by the kernel that is for such a batch."""
    from pi0exp.kernels.attention_ahead import attend_ahead
    from pi0exp.kernels.attention_dense import attend_dense

    op = attend_ahead if q_BTNH.shape[0] == 1 else attend_dense
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
