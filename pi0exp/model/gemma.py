"""Gemma as Pi0 uses it, twice: paligemma reads the prefix once, the action expert reads the suffix against its cache.

Shapes: B batch, T query tokens, S cached tokens, N query heads, K key/value heads, H head dim, D width.
"""

from torch import Tensor, cat, nn

from pi0exp.model.config import GemmaConfig, ModelConfig
from pi0exp.model.layers import AdaRMSNorm, Attention, GatedMlp, Linear, RMSNorm, rotate
from pi0exp.model.mask import Mask

LayerCache = tuple[Tensor, Tensor]
"""Keys (after RoPE) and values of one layer, each [B, S, K, H]."""
Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the tokens' positions, from `Rope`."""


class GemmaAttention(Attention):
    """Grouped-query attention with RoPE; keys and values of the prefix, if given, stand before the tokens' own."""

    def __init__(self, stack: GemmaConfig, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(stack.width, config.num_heads * config.head_dim, bias=False)
        self.k = Linear(stack.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v = Linear(stack.width, config.num_kv_heads * config.head_dim, bias=False)
        self.out = Linear(config.num_heads * config.head_dim, stack.width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, prefix: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        q_BTNH, k_BTKH, v_BTKH = (f(x_BTD).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotation), rotate(k_BTKH, *rotation)
        if prefix is not None:
            k_BTKH, v_BTKH = cat([prefix[0], k_BTKH], dim=1), cat([prefix[1], v_BTKH], dim=1)
        mixed_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, mask)
        return self.out(mixed_BTNH.flatten(2)), (k_BTKH, v_BTKH)


class GemmaBlock(nn.Module):
    """Attention and MLP, each behind a norm; an adaptive norm also gates the branch behind it."""

    def __init__(self, stack: GemmaConfig, config: ModelConfig, adaptive: bool):
        super().__init__()
        norm = AdaRMSNorm if adaptive else RMSNorm
        self.norm1 = norm(stack.width, config.norm_eps)
        self.attention = GemmaAttention(stack, config)
        self.norm2 = norm(stack.width, config.norm_eps)
        self.mlp = GatedMlp(stack.width, stack.mlp_dim)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, prefix: LayerCache | None, cond_BD: Tensor | None
    ) -> tuple[Tensor, LayerCache]:
        normed_BTD, gate_B1D = self.norm1(x_BTD, cond_BD)
        branch_BTD, cache = self.attention(normed_BTD, rotation, mask, prefix)
        x_BTD = add_gated(x_BTD, branch_BTD, gate_B1D)
        normed_BTD, gate_B1D = self.norm2(x_BTD, cond_BD)
        return add_gated(x_BTD, self.mlp(normed_BTD), gate_B1D), cache


def add_gated(x_BTD: Tensor, branch_BTD: Tensor, gate_B1D: Tensor | None) -> Tensor:
    """The residual sum; the raw gate multiplies the branch (no 1 + gate)."""
    return x_BTD + (branch_BTD if gate_B1D is None else branch_BTD * gate_B1D)


class Gemma(nn.Module):
    """A stack of blocks and a final norm."""

    def __init__(self, stack: GemmaConfig, config: ModelConfig, adaptive: bool):
        super().__init__()
        self.blocks = nn.ModuleList(GemmaBlock(stack, config, adaptive) for _ in range(stack.depth))
        self.norm = (AdaRMSNorm if adaptive else RMSNorm)(stack.width, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, prefix: list[LayerCache] | None, cond_BD: Tensor | None
    ) -> tuple[Tensor, list[LayerCache]]:
        """The normed tokens [B, T, D], and of every layer the keys and values that its queries saw."""
        caches: list[LayerCache] = []
        for i, block in enumerate(self.blocks):
            x_BTD, cache = block(x_BTD, rotation, mask, None if prefix is None else prefix[i], cond_BD)
            caches.append(cache)
        normed_BTD, _ = self.norm(x_BTD, cond_BD)
        return normed_BTD, caches
