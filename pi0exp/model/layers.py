"""The parts that the transformers of Pi0 share, with the slots that optimizations fill.

A slot is a function that an instance looks up on itself. `Policy.fill` sets it on the instances of a stage; nothing
else is ever patched. From fine to coarse: `Linear.matmul`, `Attention.attend`, `normalize` of the norms, `activate` and
`hidden` of the MLPs, `project` of the attentions, `join` of the blocks.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head dim, D width,
F hidden width of an MLP.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.model.mask import Mask

MatmulFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
AttendFn = Callable[[Tensor, Tensor, Tensor, Mask | None, float], Tensor]


class Branch(NamedTuple):
    """What a branch of a block adds to the residual stream: value [B, T, D], times the gate [B, 1, D] if there is one.

    It is added by the norm that comes next, so that both can be one operation.
    """

    value: Tensor
    gate: Tensor | None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and softmax: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """y = x W^T + b. Slot `matmul`: (x [..., in], weight [out, in], bias [out] or None) -> [..., out]."""

    matmul: MatmulFn = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


def eager_attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, each operation by itself, with the original's roundings.

    Scores are rounded to the activations' dtype before and after scaling, the softmax is taken in float32 and its
    probabilities are rounded. Query heads in groups of G share one key/value head.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.unflatten(2, (K, N // K))
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * scale
    wide = at_least_float32(q_BTNH.dtype)
    if mask is not None:
        scores_BKGTS = scores_BKGTS + mask.additive(wide)[:, None, None]
    probs_BKGTS = scores_BKGTS.softmax(dim=-1, dtype=wide).to(q_BTNH.dtype)
    return torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


class Attention(nn.Module):
    """Holds the slot `attend`: (q_BTNH, k_BSKH, v_BSKH, mask or None, scale) -> out_BTNH; and that scale, H^-0.5."""

    attend: AttendFn = staticmethod(eager_attend)

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim, self.scale = head_dim, head_dim**-0.5


def add_branch(x_BTD: Tensor, branch_BTD: Tensor | None, gate_B1D: Tensor | None) -> Tensor:
    """The residual sum; the raw gate multiplies the branch (no 1 + gate)."""
    if branch_BTD is None:
        return x_BTD
    return x_BTD + (branch_BTD if gate_B1D is None else branch_BTD * gate_B1D)


def plain_normalize(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_B1D: Tensor | None,
    scale_D: Tensor,
    shift_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The residual sum x, and x / rms(x) * (1 + scale) + shift in float32, rounded once; both [B, T, D].

    `scale` and `shift` are [D] or [B, 1, D].
    """
    x_BTD = add_branch(x_BTD, branch_BTD, gate_B1D)
    x32_BTD = x_BTD.to(at_least_float32(x_BTD.dtype))
    y_BTD = F.rms_norm(x32_BTD, x_BTD.shape[-1:], eps=eps) * (1.0 + scale_D)
    return x_BTD, (y_BTD if shift_D is None else y_BTD + shift_D).to(x_BTD.dtype)


NormalizeFn = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, float],
    tuple[Tensor, Tensor],
]


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: the weight is an offset from one. Slot `normalize`."""

    normalize: NormalizeFn = staticmethod(plain_normalize)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x_BTD: Tensor, branch: Branch | None, cond: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """x with the branch added, its norm, and no gate. `cond` belongs to the adaptive kind and must be None."""
        assert cond is None
        value_BTD, gate_B1D = branch or (None, None)
        return *self.normalize(x_BTD, value_BTD, gate_B1D, self.weight, None, self.eps), None


def plain_modulate(norm: "AdaRMSNorm", cond_BD: Tensor) -> Tensor:
    """Scale, shift and gate side by side, [B, 1, 3 D]."""
    modulation_BE: Tensor = norm.dense(cond_BD)
    return modulation_BE[:, None, :]


class AdaRMSNorm(nn.Module):
    """Pi0.5's RMSNorm, whose scale, shift and gate come from the timestep.

    Slots `normalize`, and `modulate`: (norm, condition) -> [B, 1, 3 D].
    """

    normalize: NormalizeFn = staticmethod(plain_normalize)
    modulate: Callable[["AdaRMSNorm", Tensor], Tensor] = staticmethod(plain_modulate)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.dense, self.eps = Linear(width, 3 * width), eps

    def forward(self, x_BTD: Tensor, branch: Branch | None, cond: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x with the branch added, its modulated norm, and the gate [B, 1, D] of the branch that follows."""
        assert cond is not None
        value_BTD, gate_B1D = branch or (None, None)
        scale_B1D, shift_B1D, next_B1D = self.modulate(self, cond).chunk(3, dim=-1)
        x_BTD, y_BTD = self.normalize(x_BTD, value_BTD, gate_B1D, scale_B1D, shift_B1D, self.eps)
        return x_BTD, y_BTD, next_B1D.to(x_BTD.dtype)


def plain_layer_norm(
    x_BPD: Tensor, branch_BPD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual sum x and its layer norm, both [B, P, D]."""
    x_BPD = add_branch(x_BPD, branch_BPD, None)
    return x_BPD, F.layer_norm(x_BPD, weight_D.shape, weight_D, bias_D, eps)


class LayerNorm(nn.LayerNorm):
    """SigLIP's norm. Slot `normalize`."""

    normalize: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]] = staticmethod(
        plain_layer_norm
    )

    def forward(self, x_BPD: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x with the branch added, and its norm."""
        return self.normalize(x_BPD, None if branch is None else branch.value, self.weight, self.bias, self.eps)


JoinFn = Callable[[nn.Module, Tensor, Tensor, Tensor | None], tuple[Tensor, Branch | None]]


def plain_join(linear: nn.Module, hidden_BTE: Tensor, x_BTD: Tensor, gate_B1D: Tensor | None) -> Any:
    """The end of a branch: (x, branch). A product that adds the residual itself gives (sum, None)."""
    return x_BTD, Branch(linear(hidden_BTE), gate_B1D)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, with which SigLIP and Gemma were trained."""
    return F.gelu(x, approximate="tanh")


def plain_activate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up."""
    return gelu(gate) * up


def plain_gated(mlp: "GatedMlp", x_BTD: Tensor) -> Tensor:
    """gelu(gate(x)) * up(x), [B, T, F]."""
    return mlp.activate(mlp.gate(x_BTD), mlp.up(x_BTD))


class GatedMlp(nn.Module):
    """Gemma's MLP: down(gelu(gate(x)) * up(x)), of which `down` is left to the block.

    Slots `activate`: (gate, up) -> product; `hidden`: (mlp, x) -> what goes into `down`.
    """

    activate: Callable[[Tensor, Tensor], Tensor] = staticmethod(plain_activate)
    hidden: Callable[["GatedMlp", Tensor], Tensor] = staticmethod(plain_gated)
    gate_up: Linear  # in the place of gate and up where they are merged

    def __init__(self, width: int, mlp_dim: int):
        super().__init__()
        self.gate = Linear(width, mlp_dim, bias=False)
        self.up = Linear(width, mlp_dim, bias=False)
        self.down = Linear(mlp_dim, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.hidden(self, x_BTD)


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
