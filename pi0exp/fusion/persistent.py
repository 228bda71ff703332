"""All layers of a denoising step in one launch: `fusion.persistent`; the chain of `fusion.blocks` has five a layer.

The launch itself is `pi0exp.kernels.stream_layers`, with `fusion.ring` `pi0exp.kernels.stream_ring`, with `fusion.wide`
and more rows than those take `pi0exp.kernels.stream_wide`; here are its arguments. Shapes: B batch, T suffix tokens, D
width, L layers, R rows of a cache's room, K key/value heads, H head dim.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from pi0exp.errors import UnsupportedError
from pi0exp.model.gemma import Gemma, GemmaBlock, LayerCache, Rotation
from pi0exp.model.mask import Mask

if TYPE_CHECKING:
    from pi0exp.kernels.stream_pack import Weights


class Tables(NamedTuple):
    """What the norms of a step do, a row for each.

    scales: [2 L + 1, D]. gates: [2 L, D] or None. qkv_offsets, gate_up_offsets: [L, ..] or None.
    """

    scales: Tensor
    gates: Tensor | None
    qkv_offsets: Tensor | None
    gate_up_offsets: Tensor | None


class Layers:
    """The expert's layers, their weights in the order of the kernel (once more as large as they are).

    form: of `form_for`.
    """

    def __init__(self, expert: Gemma, slots: Tensor, form: "Form"):
        from pi0exp.kernels.stream_pack import Weights

        self.blocks = cast(list[GemmaBlock], list(expert.blocks))
        self.slots, self.eps = slots, self.blocks[0].norm1.eps
        weights = Weights(
            torch.stack([block.attention.qkv.weight for block in self.blocks]),
            torch.stack([block.attention.out.weight for block in self.blocks]),
            torch.stack([block.mlp.gate_up.weight for block in self.blocks]),
            torch.stack([block.mlp.down.weight for block in self.blocks]),
        )
        self.sizes = [weight.shape[1] for weight in (weights.qkv_LCD, weights.gate_up_LCD)]
        self.rows, self.launch = form.rows, form.make(weights, self.blocks[0].attention.head_dim)
        norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        own = [getattr(norm, "weight", None) for norm in (*norms, expert.norm)]
        self.own = None if None in own else Tables(torch.stack(cast(list[Tensor], own)), None, None, None)

    def takes(self, B: int, T: int) -> bool:
        """One observation, of as many rows as the launch is made for."""
        return B == 1 and self.rows >= T

    def tables(self, cond: Tensor | None) -> Tables:
        """Pi0's are the same in every step; Pi0.5's stand in the row that `blocks.tabulate_offsets` made for it."""
        if cond is None:
            assert self.own is not None
            return self.own
        L, width = len(self.blocks), self.blocks[0].mlp.down.weight.shape[0]
        modulations, offsets = cond.split([(L + 1) * 2 * 3 * width, L * sum(self.sizes)])
        scales, _, gates = modulations.view(-1, 3, width).unbind(1)
        # The final norm has two places in the row and stands in the first; it gates nothing.
        return Tables(scales[:-1], gates[:-2], *offsets.view(L, -1).split(self.sizes, dim=1))

    def __call__(
        self, tokens_BTD: Tensor, cond: Tensor | None, rotation: Rotation, mask: Mask, cache: Sequence[LayerCache],
        settled: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `stream_end` takes: xs [B, T, D] and the sums of squares.

        cond: of `Pi0.embed_suffix`. settled: rows of the cache that were complete before this step and the one before.
        """
        assert not mask.causal, "image_masking=ignore refuses the blocks beside steps=causal"
        start, scale = cache[0].k_BSKH.shape[1], self.blocks[0].attention.scale
        keys_BS = None if mask.full else mask.keys_BS
        return self.launch(
            tokens_BTD.contiguous(), *self.tables(cond), *rotation, one_room(cache), start, keys_BS, mask.blind, scale,
            settled, self.eps, self.slots, None,
        )  # fmt: skip


Launch = Callable[..., tuple[Tensor, Tensor]]


class Form(NamedTuple):
    """A kernel for all layers. rows: that it takes at most. make: weights, head dim -> its launch."""

    rows: int
    make: Callable[["Weights", int], Launch]


def form_for(rows: int, ring: bool, wide: bool) -> Form | None:
    """The kernel for steps of so many rows; None where there is none."""
    from pi0exp.kernels import stream_pack
    from pi0exp.kernels import wide as wide_products

    if rows <= (few := stream_pack.ROWS.value):
        return Form(few, through_a_ring if ring else in_registers)
    if wide and rows <= (many := wide_products.ROWS.value):
        return Form(many, through_a_wide_ring)
    return None


def in_registers(weights: "Weights", head_dim: int) -> Launch:
    """`stream_layers` with these weights, packed. Raises UnsupportedError where it cannot take them."""
    from pi0exp.kernels.stream_layers import stream_layers
    from pi0exp.kernels.stream_pack import pack, unfit

    (_, width, heads), hidden = weights.out_LDK.shape, weights.down_LDF.shape[2]
    if why := unfit(width, head_dim, hidden, heads // head_dim):
        raise UnsupportedError(f"persistent: {why}")
    packed = pack(weights, head_dim)
    return lambda tokens_BTD, *rest: stream_layers(tokens_BTD, *packed, *rest)


def through_a_ring(weights: "Weights", head_dim: int) -> Launch:
    """`stream_ring` likewise."""
    from pi0exp.kernels.ring_pack import misfit, packed_ring
    from pi0exp.kernels.stream_ring import stream_ring

    return _in_chunks("ring", misfit, packed_ring, stream_ring, weights, head_dim)


def through_a_wide_ring(weights: "Weights", head_dim: int) -> Launch:
    """`stream_wide` likewise."""
    from pi0exp.kernels.stream_wide import stream_wide
    from pi0exp.kernels.wide_pack import misfit, packed_wide

    return _in_chunks("wide", misfit, packed_wide, stream_wide, weights, head_dim)


def _in_chunks(
    switch: str, misfit: Callable[..., str], pack: Callable[["Weights", int], Tensor], op: Launch,
    weights: "Weights", head_dim: int,
) -> Launch:  # fmt: skip
    (_, width, heads), hidden = weights.out_LDK.shape, weights.down_LDF.shape[2]
    if why := misfit(width, head_dim, hidden, heads // head_dim, weights.qkv_LCD.shape[1] // head_dim):
        raise UnsupportedError(f"{switch}: {why}")
    packed = pack(weights, head_dim)
    return lambda tokens_BTD, *rest: op(tokens_BTD, packed, *rest)


def one_room(cache: Sequence[LayerCache]) -> Tensor:
    """The rooms of all layers, which `steps.give_room` takes from one buffer, as that: [L, B, R, 2 K, H]."""
    rooms = [layer.room for layer in cache if layer.room is not None]
    first, size = rooms[0], rooms[0].numel()
    places = [room.data_ptr() - first.data_ptr() for room in rooms]
    assert places == [i * size * first.element_size() for i in range(len(cache))], "rooms are not parts of one buffer"
    return first.as_strided((len(rooms), *first.shape), (size, *first.stride()))
