"""Matrices that read the same input, merged into one: fewer and larger products.

Shapes: B batch, T tokens, D width, N query heads, K key/value heads, J = N + K heads that turn, M = N + 2 K all heads,
H head dim, F hidden width of an MLP.
"""

import torch
from torch import Tensor

from pi0exp.fusion.keys_only import KeysOnly
from pi0exp.model.gemma import GemmaAttention, LayerCache, Rotation, extend, first_rows
from pi0exp.model.layers import GatedMlp, Linear, rotate
from pi0exp.model.siglip import VisionAttention
from pi0exp.policy import Policy


def merged(linears: list[Linear]) -> Linear:
    """One matrix for several with the same input, rows in their order; biases where they have them."""
    first = linears[0]
    rows = sum(linear.out_features for linear in linears)
    with torch.device("meta"):
        one = Linear(first.in_features, rows, bias=first.bias is not None)
    one.weight = torch.nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if first.bias is not None:
        one.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return one


def merge_qkv(policy: Policy) -> None:
    """`q`, `k` and `v` of every attention become `qkv`; those of a layer that makes only keys and values, `kv`."""
    for stage in ("vision", "prefill", "denoise"):
        for attention in policy.instances(VisionAttention if stage == "vision" else GemmaAttention, stage):
            attention.qkv = merged([attention.q, attention.k, attention.v])
            del attention.q, attention.k, attention.v
        for layer in policy.instances(KeysOnly, stage):
            layer.kv = merged([layer.k, layer.v])
            del layer.k, layer.v
            layer.project = keys_from_one
    policy.fill(VisionAttention, "project", vision_from_one, ("vision",), "one matrix for q, k and v")
    policy.fill(GemmaAttention, "project", project_from_one, ("prefill", "denoise"), "one matrix for q, k and v")


def vision_from_one(attention: VisionAttention, x_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slot `VisionAttention.project`."""
    q_BPNH, k_BPNH, v_BPNH = attention.qkv(x_BPD).unflatten(-1, (3, -1, attention.head_dim)).unbind(-3)
    return q_BPNH, k_BPNH, v_BPNH


def split(attention: GemmaAttention, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] before rotation, by whichever matrices there are."""
    H = attention.head_dim
    if hasattr(attention, "qkv"):
        heads_BTMH = attention.qkv(x_BTD).unflatten(-1, (-1, H))
        K = attention.num_kv_heads
        q, k, v = heads_BTMH.split([heads_BTMH.shape[2] - 2 * K, K, K], dim=2)
        return q, k, v
    q, k, v = (linear(x_BTD).unflatten(-1, (-1, H)) for linear in (attention.q, attention.k, attention.v))
    return q, k, v


def project_from_one(
    attention: GemmaAttention, x_BTD: Tensor, rotation: Rotation, prefix: LayerCache | None
) -> tuple[Tensor, LayerCache]:
    """The slot `GemmaAttention.project`; queries and keys turn together.

    Where the room has a place for queries all heads are stored at once: Inductor makes one kernel of it, and two where
    keys and values go elsewhere than queries.
    """
    K = attention.num_kv_heads
    heads_BTMH = attention.qkv(x_BTD).unflatten(-1, (-1, attention.head_dim))
    turned_BTJH, v_BTKH = rotate(heads_BTMH[:, :, :-K], *rotation), heads_BTMH[:, :, -K:]
    if prefix is None or prefix.room is None or prefix.room.shape[2] < heads_BTMH.shape[2]:
        return turned_BTJH[:, :, :-K], extend(prefix, turned_BTJH[:, :, -K:], v_BTKH)
    start, stop = prefix.k_BSKH.shape[1], prefix.k_BSKH.shape[1] + x_BTD.shape[1]
    prefix.room[:, start:stop] = torch.cat([turned_BTJH, v_BTKH], dim=2)
    return prefix.room[:, start:stop, : -2 * K], first_rows(prefix.room, stop, K)


def keys_from_one(layer: KeysOnly, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The slot `KeysOnly.project`."""
    k_BTH, v_BTH = layer.kv(x_BTD).chunk(2, dim=-1)
    return k_BTH, v_BTH


def merge_gate_up(policy: Policy) -> None:
    """`gate` and `up` of Gemma's MLPs become `gate_up`, gate's rows first."""
    for stage in ("prefill", "denoise"):
        for mlp in policy.instances(GatedMlp, stage):
            mlp.gate_up = merged([mlp.gate, mlp.up])
            del mlp.gate, mlp.up
    policy.fill(GatedMlp, "hidden", hidden_from_one, ("prefill", "denoise"), "one matrix for gate and up")


def hidden_from_one(mlp: GatedMlp, x_BTD: Tensor) -> Tensor:
    """The slot `GatedMlp.hidden`: [B, T, F]."""
    gate_BTF, up_BTF = mlp.gate_up(x_BTD).chunk(2, dim=-1)
    return mlp.activate(gate_BTF, up_BTF)
