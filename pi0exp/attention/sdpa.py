"""Attention by `torch.nn.functional.scaled_dot_product_attention`, masks honoured.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head dim.

The G query heads that share a key/value head are laid out as rows of one attention, [B, K, T * G, H] against
[B, K, S, H]. So keys and values are never repeated, and every backend of SDPA can run it, also those that know no
grouped heads. Where every key is real no mask is passed, which lets SDPA choose its fastest backends.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import Numerics, StagedOption
from pi0exp.policy import Policy


@dataclass(frozen=True)
class Sdpa(StagedOption):
    """Fused attention of PyTorch; it picks flash, memory-efficient or cuDNN kernels by shape and mask."""

    numerics = Numerics.REORDERED
    proof = r"flash_fwd|fmha|_sdpa_|attn_fwd"

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        policy.fill(Attention, "attend", sdpa_attend, stages, "scaled_dot_product_attention")


def sdpa_attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None) -> Tensor:
    """The slot `attend`. Rows of padded queries see the real keys, not all keys; nothing ever reads them."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    rows_BKRH = q_BTNH.unflatten(2, (K, G)).permute(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    out_BKRH = F.scaled_dot_product_attention(
        rows_BKRH, k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), attn_mask=_row_mask(mask, G)
    )
    out_BTNH: Tensor = out_BKRH.unflatten(2, (T, G)).permute(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out_BTNH


def _row_mask(mask: Mask | None, group: int) -> Tensor | None:
    """bool, broadcastable to [B, K, T * G, S]; None where every query sees every key."""
    if mask is None or (mask.full and not mask.blind):
        return None
    if not mask.blind:
        return mask.keys_BS[:, None, None, :]
    return mask.visible()[:, None].repeat_interleave(group, dim=2)
