"""Who may attend to whom, as structure. Plain attention asks for `dense()`, a flash kernel reads the facts.

Shapes: B batch, T query tokens, S key tokens.
"""

import torch
from torch import Tensor

# Finite, as in the original: a row that may see nothing becomes uniform instead of NaN, and NaN would leak through
# the product with V into every other row of the next layer.
HIDDEN = -2.3819763e38


class Mask:
    """Which keys each query may see.

    keys_BS: bool, True for real keys. own: behind them the queries' own keys come, all of them real. Where every key is
        real they are put together only if somebody asks: most kernels do not, and a step would launch two more.
    queries_BT: bool, True for real queries; None if all of them are.
    full: the host knows that every key is real.
    blind: the first query sees only the keys before the last T and itself; this is how Pi0's state token does not see
        the actions.
    causal: query t sees key 0 to t and nothing else. The model has no such mask; see `image_masking=ignore`.
    """

    def __init__(
        self,
        keys_BS: Tensor,
        num_queries: int,
        *,
        full: bool,
        own: bool = False,
        queries_BT: Tensor | None = None,
        blind: bool = False,
        causal: bool = False,
    ):
        self.queries_BT = queries_BT
        self.num_queries, self.full, self.blind, self.causal = num_queries, full, blind, causal
        self._before_BS = keys_BS
        self._keys_BS = None if own else keys_BS
        if own and not full:  # not later: compiled blocks would see a mask that changes from one to the next
            self._keys_BS = self.keys_BS
        self._visible: Tensor | None = None
        self._additive: Tensor | None = None

    @property
    def keys_BS(self) -> Tensor:  # noqa: N802 (a shape suffix)
        """bool [B, S], True for real keys, of all that the queries may see."""
        if self._keys_BS is None:
            own_BT = self._before_BS.new_ones(self._before_BS.shape[0], self.num_queries)
            self._keys_BS = torch.cat([self._before_BS, own_BT], dim=1)
        return self._keys_BS

    def visible(self) -> Tensor:
        """bool [B, T, S], False for whatever a real query may not see; rows of padded queries see the same keys."""
        if self._visible is None:
            seen_BTS = self.keys_BS[:, None, :].expand(-1, self.num_queries, -1)
            if self.blind:
                T, S = self.num_queries, self.keys_BS.shape[1]
                query_T, key_S = (torch.arange(n, device=self.keys_BS.device) for n in (T, S))
                seen_BTS = seen_BTS & ~((query_T == 0)[:, None] & (key_S > S - T)[None, :])
            self._visible = seen_BTS.tril() if self.causal else seen_BTS
        return self._visible

    def dense(self) -> Tensor:
        """bool [B, T, S], exactly the original's mask: padded queries see nothing."""
        seen_BTS = self.visible()
        return seen_BTS if self.queries_BT is None else seen_BTS & self.queries_BT[:, :, None]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """[B, T, S] of `dtype`: 0 where a query may look, a huge negative number elsewhere. Made once per mask."""
        if self._additive is None or self._additive.dtype != dtype:
            dense_BTS = self.dense()
            self._additive = torch.zeros_like(dense_BTS, dtype=dtype).masked_fill(~dense_BTS, HIDDEN)
        return self._additive


def prefix_mask(valid_BS: Tensor, full: bool) -> Mask:
    """All real prefix tokens see all real prefix tokens, in both directions."""
    return Mask(valid_BS, valid_BS.shape[1], full=full, queries_BT=valid_BS)


def suffix_mask(valid_BS: Tensor, suffix_tokens: int, full: bool, blind: bool) -> Mask:
    """Suffix tokens see real prefix tokens and one another; with `blind` the first sees only itself of the suffix."""
    return Mask(valid_BS, suffix_tokens, full=full, own=True, blind=blind)
