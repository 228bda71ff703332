"""The parts that the transformers of Pi0 share, with the slots that optimizations fill.

A slot is a function that an instance looks up on itself: `Linear.matmul`, `Attention.attend`, `RMSNorm.normalize`,
`GatedMlp.activate`. `Policy.fill` sets it on the instances of a stage; nothing else is ever patched.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head dim, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.model.mask import Mask

MatmulFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
AttendFn = Callable[[Tensor, Tensor, Tensor, Mask | None], Tensor]
NormalizeFn = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and softmax: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """y = x W^T + b. Slot `matmul`: (x [..., in], weight [out, in], bias [out] or None) -> [..., out]."""

    matmul: MatmulFn = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


def eager_attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v, each operation by itself, with the original's roundings.

    Scores are rounded to the activations' dtype before and after scaling, the softmax is taken in float32 and its
    probabilities are rounded. Query heads in groups of G share one key/value head.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.unflatten(2, (K, N // K))
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * H**-0.5
    wide = at_least_float32(q_BTNH.dtype)
    if mask is not None:
        scores_BKGTS = scores_BKGTS + mask.additive(wide)[:, None, None]
    probs_BKGTS = scores_BKGTS.softmax(dim=-1, dtype=wide).to(q_BTNH.dtype)
    return torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


class Attention(nn.Module):
    """Holds the slot `attend`: (q_BTNH, k_BSKH, v_BSKH, mask or None) -> out_BTNH, scaled by H^-0.5."""

    attend: AttendFn = staticmethod(eager_attend)


def plain_normalize(x_BTD: Tensor, scale_D: Tensor, shift_D: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * (1 + scale) + shift in float32, rounded once. `scale` and `shift` broadcast over tokens."""
    x32_BTD = x_BTD.to(at_least_float32(x_BTD.dtype))
    y_BTD = F.rms_norm(x32_BTD, x_BTD.shape[-1:], eps=eps) * (1.0 + scale_D)
    return (y_BTD if shift_D is None else y_BTD + shift_D).to(x_BTD.dtype)


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: the weight is an offset from one. Slot `normalize`."""

    normalize: NormalizeFn = staticmethod(plain_normalize)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x_BTD: Tensor, cond_BD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The normalised x, and no gate. `cond_BD` belongs to the adaptive kind and must be None."""
        assert cond_BD is None
        return self.normalize(x_BTD, self.weight, None, self.eps), None


class AdaRMSNorm(nn.Module):
    """Pi0.5's RMSNorm, whose scale, shift and gate come from the timestep. Slot `normalize`."""

    normalize: NormalizeFn = staticmethod(plain_normalize)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.dense, self.eps = Linear(width, 3 * width), eps

    def forward(self, x_BTD: Tensor, cond_BD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The normalised and modulated x, and the gate [B, 1, D] of the branch that follows."""
        assert cond_BD is not None
        scale_B1D, shift_B1D, gate_B1D = self.dense(cond_BD)[:, None, :].chunk(3, dim=-1)
        return self.normalize(x_BTD, scale_B1D, shift_B1D, self.eps), gate_B1D.to(x_BTD.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, with which SigLIP and Gemma were trained."""
    return F.gelu(x, approximate="tanh")


def plain_activate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up."""
    return gelu(gate) * up


class GatedMlp(nn.Module):
    """Gemma's MLP: down(gelu(gate(x)) * up(x)). Slot `activate`: (gate, up) -> product."""

    activate: Callable[[Tensor, Tensor], Tensor] = staticmethod(plain_activate)

    def __init__(self, width: int, mlp_dim: int):
        super().__init__()
        self.gate = Linear(width, mlp_dim, bias=False)
        self.up = Linear(width, mlp_dim, bias=False)
        self.down = Linear(mlp_dim, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        down: Tensor = self.down(self.activate(self.gate(x_BTD), self.up(x_BTD)))
        return down


class Rope(nn.Module):
    """Rotary embedding over the whole head: pairs (d, d + H/2) turn by position * theta^(-2d/H).

    With `rounded` the frequencies are rounded to bfloat16 (see `Precision`). Angles, cosines and sines are taken in
    float32 in every precision; they are constants of the model, not part of its arithmetic.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, rounded: bool):
        super().__init__()
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        if rounded:
            inv_freq = inv_freq.bfloat16().float()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [B, T, 1, H] of `dtype` (both halves alike), to broadcast over heads."""
        angle_BT1F = positions_BT[:, :, None, None].float() * self.inv_freq
        angle_BT1H = torch.cat([angle_BT1F, angle_BT1F], dim=-1)
        return angle_BT1H.cos().to(dtype), angle_BT1H.sin().to(dtype)


def rotate(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Turn the pairs (d, d + H/2); products and sum in the activations' dtype, as in the original."""
    low, high = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos_BT1H + torch.cat([-high, low], dim=-1) * sin_BT1H
