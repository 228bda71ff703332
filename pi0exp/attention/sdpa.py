"""Attention by `torch.nn.functional.scaled_dot_product_attention`, masks honoured.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head dim.

Fast kernels take no mask, so a mask is passed only where it is needed. Where every key is real none is; Pi0's state
token, which may not see the actions behind it, is then an attention of its own over the keys that it may see.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0exp.machine import Machine
from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.option import ANY_GPU, Numerics, Requires, StagedOption
from pi0exp.policy import Policy


class Backend(StrEnum):
    """Kernels of SDPA. A named one that cannot run a shape or mask is an error, not another kernel."""

    auto = "auto"
    flash = "flash"
    efficient = "efficient"
    cudnn = "cudnn"
    math = "math"


_FIXED = {
    Backend.flash: SDPBackend.FLASH_ATTENTION,
    Backend.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Backend.cudnn: SDPBackend.CUDNN_ATTENTION,
    Backend.math: SDPBackend.MATH,
}
_NEEDS = {Backend.efficient: ANY_GPU, Backend.cudnn: Requires(vendors=("nvidia",))}
_KERNELS = {
    Backend.auto: r"flash_fwd|fmha|_sdpa_|attn_fwd",
    Backend.flash: r"flash_fwd|attn_fwd",
    Backend.efficient: r"fmha|attn_fwd",
    Backend.cudnn: r"_sdpa_",
    Backend.math: "",  # ordinary products and a softmax, as in eager attention
}
"""What a profile shows of them; AMD's are all named attn_fwd."""
# PyTorch prefers cuDNN on Hopper. For the few rows of a denoising step flash is faster, since it splits the keys over
# the multiprocessors: 24 against 39 us for 11 rows on 799 keys, 14 against 29 us for 50 on 1018. For the 788 rows of
# the prefill cuDNN is: 27 against 42 us (H200, torch 2.11, 2026-11-24; experiments/results/sdpa_layouts).
_FLASH_FIRST = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Sdpa(StagedOption):
    """Fused attention of PyTorch.

    backend: auto lets PyTorch choose among all of them by shape and mask, with flash preferred when denoising.
    """

    numerics = Numerics.REORDERED

    backend: Backend = Backend.auto

    def unmet(self, machine: Machine) -> list[str]:
        return _NEEDS.get(self.backend, self.requires).unmet(machine)

    def proof(self) -> str:
        return _KERNELS[self.backend]

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        for stage in stages:
            attend = partial(sdpa_attend, backend=self.backend, few_rows=stage == "denoise")
            policy.fill(Attention, "attend", attend, (stage,), f"scaled_dot_product_attention({self.backend})")


def sdpa_attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: Mask | None,
    scale: float,
    *,
    backend: Backend,
    few_rows: bool,
) -> Tensor:
    """The slot `attend`. Rows of padded queries see the real keys, not all keys; nothing ever reads them."""
    with _kernels(backend, few_rows):
        if mask is not None and mask.causal:
            # What published stacks pass: PyTorch aligns it at the first key, so it is the same as `visible()`.
            assert mask.full
            return _attend(q_BTNH, k_BSKH, v_BSKH, None, scale, causal=True)
        if mask is None or (mask.full and not mask.blind):
            return _attend(q_BTNH, k_BSKH, v_BSKH, None, scale)
        if not mask.blind:
            return _attend(q_BTNH, k_BSKH, v_BSKH, mask.keys_BS[:, None, None, :], scale)
        if not mask.full:
            return _attend(q_BTNH, k_BSKH, v_BSKH, mask.visible()[:, None], scale)
        seen = k_BSKH.shape[1] - mask.num_queries + 1
        first_B1NH = _attend(q_BTNH[:, :1], k_BSKH[:, :seen], v_BSKH[:, :seen], None, scale)
        return torch.cat([first_B1NH, _attend(q_BTNH[:, 1:], k_BSKH, v_BSKH, None, scale)], dim=1)


def _kernels(backend: Backend, few_rows: bool) -> AbstractContextManager[object]:
    """Which kernels may run."""
    if backend is not Backend.auto:
        return sdpa_kernel(_FIXED[backend])
    return sdpa_kernel(_FLASH_FIRST, set_priority=few_rows)


def _attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """One attention; `visible` is bool, broadcastable to [B, N, T, S]. A shared key/value head is not copied."""
    B, S, K, H = k_BSKH.shape
    N = q_BTNH.shape[2]
    k_BNSH, v_BNSH = (
        x_BSKH.transpose(1, 2)[:, :, None].expand(B, K, N // K, S, H).reshape(B, N, S, H) for x_BSKH in (k_BSKH, v_BSKH)
    )
    q_BNTH = q_BTNH.transpose(1, 2)
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, visible, is_causal=causal, scale=scale)
    return out_BNTH.transpose(1, 2)
