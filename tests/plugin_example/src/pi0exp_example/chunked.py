"""Attention over chunks of the keys with a running softmax: the whole matrix of scores is never there.

Running maximum and sum as in Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).

Shapes: B batch, T query tokens, S key tokens, C keys of a chunk, N query heads, K key/value heads, G = N / K, H head
dim.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import Numerics, StagedOption
from pi0exp.policy import Policy


@dataclass(frozen=True)
class Chunked(StagedOption):
    """Plain PyTorch; for reading, not for speed.

    keys: how many of them a chunk has.
    """

    numerics = Numerics.REORDERED
    keys: int = 64

    def __post_init__(self) -> None:
        if self.keys < 1:
            raise ValueError(f"keys is {self.keys}; it must be 1 or more")

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        attend = partial(chunked_attend, keys=self.keys)
        policy.fill(Attention, "attend", attend, stages, f"chunks of {self.keys} keys")


def chunked_attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float, *, keys: int
) -> Tensor:
    """The slot `attend`: softmax(scale q k^T, hidden keys left out) v in float32 (float64 for such queries)."""
    wide = torch.promote_types(q_BTNH.dtype, torch.float32)
    q_BKGTH = q_BTNH.unflatten(2, (k_BSKH.shape[2], -1)).permute(0, 2, 3, 1, 4).to(wide) * scale
    visible_BTS = None if mask is None else mask.visible()
    least = torch.finfo(wide).min
    top_BKGT1 = torch.full_like(q_BKGTH[..., :1], least)
    sum_BKGT1 = torch.zeros_like(top_BKGT1)
    out_BKGTH = torch.zeros_like(q_BKGTH)
    for start in range(0, k_BSKH.shape[1], keys):
        k_BCKH, v_BCKH = (x_BSKH[:, start : start + keys].to(wide) for x_BSKH in (k_BSKH, v_BSKH))
        scores_BKGTC = torch.einsum("bkgth,bckh->bkgtc", q_BKGTH, k_BCKH)
        if visible_BTS is not None:
            # Finite: a row that has seen no key yet has weights without meaning, which the first real key multiplies
            # by exp(least - top) = 0.
            hidden_BTC = ~visible_BTS[:, :, start : start + keys]
            scores_BKGTC = scores_BKGTC.masked_fill(hidden_BTC[:, None, None], least)
        new_BKGT1 = torch.maximum(top_BKGT1, scores_BKGTC.amax(dim=-1, keepdim=True))
        weights_BKGTC = (scores_BKGTC - new_BKGT1).exp()
        shrink_BKGT1 = (top_BKGT1 - new_BKGT1).exp()
        sum_BKGT1 = sum_BKGT1 * shrink_BKGT1 + weights_BKGTC.sum(dim=-1, keepdim=True)
        out_BKGTH = out_BKGTH * shrink_BKGT1 + torch.einsum("bkgtc,bckh->bkgth", weights_BKGTC, v_BCKH)
        top_BKGT1 = new_BKGT1
    return (out_BKGTH / sum_BKGT1).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q_BTNH.dtype)
