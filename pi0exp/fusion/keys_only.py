"""The last prefill layer as far as it is needed: its keys and values.

Shapes: B batch, T tokens, D width, K key/value heads, H head dim.
"""

from collections.abc import Callable

from torch import Tensor, nn

from pi0exp.model.gemma import GemmaBlock, LayerCache, Rotation, extend
from pi0exp.model.layers import Branch, Linear, rotate
from pi0exp.model.mask import Mask


def plain_project(layer: "KeysOnly", x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before rotation and values, each [B, T, K H]."""
    return layer.k(x_BTD), layer.v(x_BTD)


def plain_keep(k_BTKH: Tensor, v_BTKH: Tensor, rotation: Rotation, prefix: LayerCache | None) -> LayerCache:
    """The cache with the rotated keys and the values behind it."""
    return extend(prefix, rotate(k_BTKH, *rotation), v_BTKH)


class KeysOnly(nn.Module):
    """Stands in a block's place without queries, attention and MLP.

    Slots: `project`: (layer, x) -> keys, values, each [B, T, K H]; `keep`: (keys before rotation and values, each
    [B, T, K, H], rotation, prefix or None) -> the cache with both.
    """

    project: Callable[["KeysOnly", Tensor], tuple[Tensor, Tensor]] = staticmethod(plain_project)
    keep: Callable[[Tensor, Tensor, Rotation, LayerCache | None], LayerCache] = staticmethod(plain_keep)

    kv: Linear  # in the place of k and v where they are merged

    def __init__(self, block: GemmaBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.k, self.v, self.head_dim = block.attention.k, block.attention.v, block.attention.head_dim

    def forward(
        self,
        x_BTD: Tensor,
        branch: Branch | None,
        rotation: Rotation,
        mask: Mask,
        prefix: LayerCache | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, Branch | None, LayerCache]:
        """As `GemmaBlock.forward`; the residual stream is what came in, and nobody reads it."""
        x_BTD, normed_BTD, _ = self.norm1(x_BTD, branch, cond)
        k_BTKH, v_BTKH = (half.unflatten(-1, (-1, self.head_dim)) for half in self.project(self, normed_BTD))
        return x_BTD, None, self.keep(k_BTKH, v_BTKH, rotation, prefix)


class NoNorm(nn.Module):
    """In the place of a final norm that nobody reads."""

    def forward(self, x_BTD: Tensor, branch: Branch | None, cond: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """x as it is, twice."""
        return x_BTD, x_BTD, None
