"""Attention by Pi0's own Triton kernels, which honour every mask of the model in one pass.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import ANY_GPU, Numerics, StagedOption
from pi0exp.policy import Policy


@dataclass(frozen=True)
class TritonAttention(StagedOption):
    """`attend_dense` for the many rows of vision and prefill, `attend_split` for the few of a denoising step."""

    requires = ANY_GPU
    numerics = Numerics.REORDERED

    def proof(self) -> str:
        return "attend_kernel"  # both ops launch it

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        # Triton is there on Linux only; elsewhere the option must still be known, to be refused with its reason.
        from pi0exp.kernels.attention_dense import attend_dense
        from pi0exp.kernels.attention_split import attend_split

        for stage in stages:
            op, name = (attend_split, "attend_split") if stage == "denoise" else (attend_dense, "attend_dense")
            policy.fill(Attention, "attend", partial(triton_attend, op=op), (stage,), f"Triton {name}")


def triton_attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float, *, op: Callable[..., Tensor]
) -> Tensor:
    """The slot `attend`. Rows of padded queries see the real keys, not all keys; nothing ever reads them."""
    if mask is None:
        return op(q_BTNH, k_BSKH, v_BSKH, None, False, scale)
    assert not mask.causal, "image_masking=ignore refuses this attention beside steps=causal"
    keys_BS = None if mask.full else mask.keys_BS
    return op(q_BTNH, k_BSKH, v_BSKH, keys_BS, mask.blind, scale)
