"""Gemma as Pi0 uses it, twice: paligemma reads the prefix once, the action expert reads the suffix against its cache.

Shapes: B batch, T query tokens, S cached tokens, N query heads, K key/value heads, H head dim, D width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, cat, nn

from pi0exp.model.config import GemmaConfig, ModelConfig
from pi0exp.model.layers import (
    AdaRMSNorm,
    Attention,
    Branch,
    GatedMlp,
    JoinFn,
    Linear,
    RMSNorm,
    plain_join,
    rotate,
)
from pi0exp.model.mask import Mask

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the tokens' positions, from `Rope`."""


class LayerCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, each [B, S, K, H].

    room: [B, R, M, H], the larger buffer whose first S rows they are, its last 2 K heads: keys, then values. Tokens to
    come are written behind them in place. In front of them there is room for queries if M is N + 2 K. None where keys
    and values are put together anew.
    """

    k_BSKH: Tensor
    v_BSKH: Tensor
    room: Tensor | None = None


def first_rows(room_BRMH: Tensor, rows: int, num_kv_heads: int) -> LayerCache:
    """The cache of the first `rows` tokens of a room."""
    K = num_kv_heads
    return LayerCache(room_BRMH[:, :rows, -2 * K : -K], room_BRMH[:, :rows, -K:], room_BRMH)


def plain_project(
    attention: "GemmaAttention", x_BTD: Tensor, rotation: Rotation, prefix: LayerCache | None
) -> tuple[Tensor, LayerCache]:
    """Rotated queries [B, T, N, H], and keys and values behind those of the prefix."""
    linears = (attention.q, attention.k, attention.v)
    q_BTNH, k_BTKH, v_BTKH = (linear(x_BTD).unflatten(-1, (-1, attention.head_dim)) for linear in linears)
    return rotate(q_BTNH, *rotation), extend(prefix, rotate(k_BTKH, *rotation), v_BTKH)


def extend(prefix: LayerCache | None, k_BTKH: Tensor, v_BTKH: Tensor) -> LayerCache:
    """The cache with these keys and values behind it, written into its room if it has one."""
    if prefix is None:
        return LayerCache(k_BTKH, v_BTKH)
    if prefix.room is not None:
        start, stop, K = prefix.k_BSKH.shape[1], prefix.k_BSKH.shape[1] + k_BTKH.shape[1], k_BTKH.shape[2]
        prefix.room[:, start:stop, -2 * K :] = cat([k_BTKH, v_BTKH], dim=2)
        return first_rows(prefix.room, stop, K)
    return LayerCache(cat([prefix.k_BSKH, k_BTKH], dim=1), cat([prefix.v_BSKH, v_BTKH], dim=1))


ProjectFn = Callable[["GemmaAttention", Tensor, Rotation, LayerCache | None], tuple[Tensor, LayerCache]]


class GemmaAttention(Attention):
    """Grouped-query attention with RoPE, up to the output matrix, which is left to the block.

    Slot `project`: (attention, x, rotation, prefix or None) -> (queries, cache that they see).
    """

    project: ProjectFn = staticmethod(plain_project)
    qkv: Linear  # in the place of q, k and v where they are merged

    def __init__(self, stack: GemmaConfig, config: ModelConfig):
        super().__init__(config.head_dim)
        self.num_kv_heads = config.num_kv_heads
        self.q = Linear(stack.width, config.num_heads * config.head_dim, bias=False)
        self.k = Linear(stack.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v = Linear(stack.width, config.num_kv_heads * config.head_dim, bias=False)
        self.out = Linear(config.num_heads * config.head_dim, stack.width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, prefix: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        q_BTNH, cache = self.project(self, x_BTD, rotation, prefix)
        return self.attend(q_BTNH, cache.k_BSKH, cache.v_BSKH, mask, self.scale).flatten(2), cache


class GemmaBlock(nn.Module):
    """Attention and MLP, each behind a norm that adds the branch before it; an adaptive norm also gates its own.

    Slot `join`: (output matrix, its input, x, gate) -> (x, branch).
    """

    join: JoinFn = staticmethod(plain_join)

    def __init__(self, stack: GemmaConfig, config: ModelConfig, adaptive: bool):
        super().__init__()
        norm = AdaRMSNorm if adaptive else RMSNorm
        self.norm1 = norm(stack.width, config.norm_eps)
        self.attention = GemmaAttention(stack, config)
        self.norm2 = norm(stack.width, config.norm_eps)
        self.mlp = GatedMlp(stack.width, stack.mlp_dim)

    def forward(
        self,
        x_BTD: Tensor,
        branch: Branch | None,
        rotation: Rotation,
        mask: Mask,
        prefix: LayerCache | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, Branch | None, LayerCache]:
        """The residual stream, the branch that is still to be added to it, and the cache of this layer."""
        x_BTD, normed_BTD, gate_B1D = self.norm1(x_BTD, branch, cond)
        mixed_BTE, cache = self.attention(normed_BTD, rotation, mask, prefix)
        x_BTD, branch = self.join(self.attention.out, mixed_BTE, x_BTD, gate_B1D)
        x_BTD, normed_BTD, gate_B1D = self.norm2(x_BTD, branch, cond)
        x_BTD, branch = self.join(self.mlp.down, self.mlp(normed_BTD), x_BTD, gate_B1D)
        return x_BTD, branch, cache


def same_condition(cond: Tensor | None, count: int) -> list[Tensor | None]:
    """All norms share one condition."""
    return [cond] * count


class Gemma(nn.Module):
    """A stack of blocks and a final norm. Slot `conditions`: (condition, count) -> that of each block and the norm."""

    conditions: Callable[[Tensor | None, int], Sequence[Tensor | None]] = staticmethod(same_condition)

    def __init__(self, stack: GemmaConfig, config: ModelConfig, adaptive: bool):
        super().__init__()
        self.blocks = nn.ModuleList(GemmaBlock(stack, config, adaptive) for _ in range(stack.depth))
        self.norm: nn.Module = (AdaRMSNorm if adaptive else RMSNorm)(stack.width, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, prefix: list[LayerCache] | None, cond: Tensor | None
    ) -> tuple[Tensor, list[LayerCache]]:
        """The normed tokens [B, T, D], and of every layer the keys and values that its queries saw."""
        caches: list[LayerCache] = []
        branch: Branch | None = None
        conds = self.conditions(cond, len(self.blocks) + 1)
        for i, block in enumerate(self.blocks):
            past = None if prefix is None else prefix[i]
            x_BTD, branch, cache = block(x_BTD, branch, rotation, mask, past, conds[i])
            caches.append(cache)
        _, normed_BTD, _ = self.norm(x_BTD, branch, conds[-1])
        return normed_BTD, caches
