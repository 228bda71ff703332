"""Triton kernels in the slots of norms, activations and projections. What each computes stands in `pi0exp.kernels`.

Kernels round once where the plain model rounds after every operation.

Shapes: B batch, T tokens, S prefix tokens, D width, K key/value heads, H head dim.
"""

from torch import Tensor

from pi0exp.fusion.keys_only import KeysOnly
from pi0exp.fusion.projections import split
from pi0exp.fusion.steps import give_room
from pi0exp.model.gemma import GemmaAttention, LayerCache, Rotation, first_rows
from pi0exp.model.layers import AdaRMSNorm, GatedMlp, LayerNorm, RMSNorm
from pi0exp.policy import Policy

SWITCHES = {
    "norms": r"rms_norm",
    "activation": r"gated_activation",
    "rope": r"rope_qkv",
    "patches": r"patch_embed",
    "blocks": r"stream_(qkv|layers|ring|wide)|attend_combine",  # the last with more rows than a stream takes
}
"""Switch of `Fusion` -> what the names of its kernels contain."""


def fill_norms(policy: Policy) -> None:
    """RMSNorm, adaptive RMSNorm and LayerNorm, each with the residual sum before it in one kernel."""
    policy.fill(LayerNorm, "normalize", layer_normalize, ("vision",), "Triton layer_norm")
    policy.fill(RMSNorm, "normalize", rms_normalize, ("prefill",), "Triton rms_norm")
    adaptive = policy.model.config.pi05
    kind, name = (AdaRMSNorm, "adarms_norm") if adaptive else (RMSNorm, "rms_norm")
    policy.fill(kind, "normalize", adarms_normalize if adaptive else rms_normalize, ("denoise",), f"Triton {name}")


def layer_normalize(
    x_BPD: Tensor, branch_BPD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The slot `LayerNorm.normalize`."""
    from pi0exp.kernels.layer_norm import add_layer_norm, layer_norm

    if branch_BPD is None:
        return x_BPD, layer_norm(x_BPD, weight_D, bias_D, eps)
    both: tuple[Tensor, Tensor] = add_layer_norm(x_BPD, branch_BPD, weight_D, bias_D, eps)
    return both


def rms_normalize(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_B1D: Tensor | None,
    scale_D: Tensor,
    shift_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The slot `RMSNorm.normalize`; its branches have no gate and it has no shift."""
    from pi0exp.kernels.rms_norm import add_rms_norm, rms_norm

    assert gate_B1D is None
    assert shift_D is None
    if branch_BTD is None:
        return x_BTD, rms_norm(x_BTD, scale_D, eps)
    both: tuple[Tensor, Tensor] = add_rms_norm(x_BTD, branch_BTD, scale_D, eps)
    return both


def adarms_normalize(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_B1D: Tensor | None,
    scale_B1D: Tensor,
    shift_B1D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The slot `AdaRMSNorm.normalize`."""
    from pi0exp.kernels.adarms_norm import adarms_norm, add_adarms_norm

    assert shift_B1D is not None
    if branch_BTD is None:
        return x_BTD, adarms_norm(x_BTD, scale_B1D, shift_B1D, eps)
    both: tuple[Tensor, Tensor] = add_adarms_norm(x_BTD, branch_BTD, gate_B1D, scale_B1D, shift_B1D, eps)
    return both


def fill_activation(policy: Policy) -> None:
    """gelu(gate) * up of both Gemmas."""
    policy.fill(GatedMlp, "activate", gated_gelu, ("prefill", "denoise"), "Triton gated_activation")


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """The slot `GatedMlp.activate`."""
    from pi0exp.kernels.gated_activation import gated_activation

    product: Tensor = gated_activation(gate, up, "gelu_tanh")
    return product


def fill_rope(policy: Policy) -> None:
    """Split, rotation and cache write in one kernel; the steps write behind the prefix instead of copying it."""
    policy.fill(GemmaAttention, "project", rope_project, ("prefill", "denoise"), "Triton rope_qkv")
    if policy.instances(KeysOnly, "prefill"):
        policy.fill(KeysOnly, "keep", rope_keep, ("prefill",), "Triton rope_qkv without queries")
    give_room(policy, queries=False)


def rope_project(
    attention: GemmaAttention, x_BTD: Tensor, rotation: Rotation, prefix: LayerCache | None
) -> tuple[Tensor, LayerCache]:
    """The slot `GemmaAttention.project`: keys and values go behind the prefix's, in place."""
    return rotated_into_room(*split(attention, x_BTD), rotation, prefix)


def rope_keep(k_BTKH: Tensor, v_BTKH: Tensor, rotation: Rotation, prefix: LayerCache | None) -> LayerCache:
    """The slot `KeysOnly.keep`."""
    return rotated_into_room(k_BTKH[:, :, :0], k_BTKH, v_BTKH, rotation, prefix)[1]


def rotated_into_room(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, rotation: Rotation, prefix: LayerCache | None
) -> tuple[Tensor, LayerCache]:
    """The queries turned, and the cache with keys and values behind the prefix's."""
    from pi0exp.kernels.rope_qkv import rope_qkv_cached

    assert prefix is not None
    assert prefix.room is not None
    S, (T, K) = prefix.k_BSKH.shape[1], k_BTKH.shape[1:3]
    whole = first_rows(prefix.room, prefix.room.shape[1], K)
    q_BTNH = rope_qkv_cached(q_BTNH, k_BTKH, v_BTKH, *rotation, whole.k_BSKH, whole.v_BSKH, S)
    return q_BTNH, first_rows(prefix.room, S + T, K)
