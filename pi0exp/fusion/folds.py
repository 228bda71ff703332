"""Factors multiplied into matrices when the stack is applied; the products are rounded once more, to their dtype.

Shapes: E output rows, D input columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.model.gemma import GemmaBlock
from pi0exp.model.layers import Attention, LayerNorm, Linear, RMSNorm, add_branch, at_least_float32
from pi0exp.model.siglip import VisionBlock
from pi0exp.policy import Policy


def scale_columns(linear: Linear, factor_D: Tensor) -> None:
    """W diag(factor), in the widest arithmetic at hand, rounded once."""
    wide = at_least_float32(linear.weight.dtype)
    replace_weight(linear, linear.weight.to(wide) * factor_D.to(wide))


def replace_weight(linear: Linear, weight_ED: Tensor) -> None:
    linear.weight = nn.Parameter(weight_ED.to(linear.weight.dtype), requires_grad=False)


def fold_q_scale(policy: Policy) -> None:
    """The scores' scale goes into the query matrix: exact for powers of two (head_dim 256, not SigLIP's 72)."""
    for stage in ("vision", "prefill", "denoise"):
        attentions = policy.instances(Attention, stage)
        for attention in attentions:
            attention.q.weight = nn.Parameter(attention.q.weight * attention.scale, requires_grad=False)
            if attention.q.bias is not None:
                attention.q.bias = nn.Parameter(attention.q.bias * attention.scale, requires_grad=False)
            attention.scale = 1.0
        policy.note(f"{stage}: {len(attentions)} query matrices hold the scale of the scores")


def fold_norms(policy: Policy) -> None:
    """Norms lose their weights, except adaptive ones and those without a matrix behind them."""
    model = policy.model
    for block in policy.instances(VisionBlock, "vision"):
        fold_layer_norm(block.norm1, [block.attention.q, block.attention.k, block.attention.v])
        fold_layer_norm(block.norm2, [block.mlp.fc1])
    fold_layer_norm(model.vision.norm, [model.vision.projector])
    policy.note("vision: weights and biases of the norms are in the matrices behind them")
    for stage in ("prefill", "denoise"):
        blocks = [block for block in policy.instances(GemmaBlock, stage) if isinstance(block.norm1, RMSNorm)]
        for block in blocks:
            fold_rms_norm(block.norm1, [block.attention.q, block.attention.k, block.attention.v])
            fold_rms_norm(block.norm2, [block.mlp.gate, block.mlp.up])
        if blocks:
            policy.note(f"{stage}: weights of {2 * len(blocks)} norms are in the matrices behind them")


def fold_rms_norm(norm: RMSNorm, linears: list[Linear]) -> None:
    """norm(x) W^T = (x / rms(x)) (W diag(1 + w))^T."""
    for linear in linears:
        scale_columns(linear, 1.0 + norm.weight)
    norm.weight = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    norm.normalize = unit_normalize


def fold_layer_norm(norm: LayerNorm, linears: list[Linear]) -> None:
    """(x^ g + b) W^T + c = x^ (W diag(g))^T + (W b + c)."""
    for linear in linears:
        wide = at_least_float32(linear.weight.dtype)
        bias_E = linear.bias.to(wide) + linear.weight.to(wide) @ norm.bias.to(wide)
        linear.bias = nn.Parameter(bias_E.to(linear.bias.dtype), requires_grad=False)
        scale_columns(linear, norm.weight)
    norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    norm.bias = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)
    norm.normalize = unit_layer_norm


def unit_normalize(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_B1D: Tensor | None,
    scale_D: Tensor,
    shift_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The slot `RMSNorm.normalize` where the weight is zero: the residual sum x, and x / rms(x)."""
    x_BTD = add_branch(x_BTD, branch_BTD, gate_B1D)
    x32_BTD = x_BTD.to(at_least_float32(x_BTD.dtype))
    return x_BTD, F.rms_norm(x32_BTD, x_BTD.shape[-1:], eps=eps).to(x_BTD.dtype)


def unit_layer_norm(
    x_BPD: Tensor, branch_BPD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The slot `LayerNorm.normalize` where the weight is one and the bias zero."""
    x_BPD = add_branch(x_BPD, branch_BPD, None)
    return x_BPD, F.layer_norm(x_BPD, weight_D.shape, eps=eps)
