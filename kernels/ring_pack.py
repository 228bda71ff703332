"""The weights of a denoising step in the order in which the programs of `stream_ring` take them: a row of chunks each.

A chunk is 32 KB: so many rows of a tile, and so much of K, that every lane has 16 bytes of it eight times, in the order
of `stream_pack`. A program's chunks of a layer are those of its tiles of w_qkv, w_out, w_gate_up, in which gate
and up take turns, and w_down.

Shapes: L layers, P programs, C rows of w_qkv, D width of the residual stream, K = N H width of the heads, F hidden
width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pi0exp.kernels.kernel import require
from pi0exp.kernels.ring import (
    ASK_ATTENTION,
    ASK_DOWN,
    ASK_MIXING,
    ASK_OUT,
    ASK_QKV,
    CHUNK_ROWS,
    CHUNK_WIDTH,
    SLOTS,
    G,
)
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, PAIRS, Weights, packed_tiles, unordered

BK_D, BK_OUT, BK_F, BN = 64, 256, 256, 64
"""Of K that a warp takes at a time, so that G warps and a tile's rows make a chunk; keys of a block."""


def packed_ring(weights: Weights, H: int) -> Tensor:
    """The chunks of all programs, [P, L, CHUNKS, values], each program's in the order in which it takes them.

    What programs without a tile of w_qkv lack stands, as zeros, behind all of theirs.

    Raises ValueError where the widths do not fit, see `misfit`.
    """
    (L, C, D), K, F = weights.qkv_LCD.shape, weights.out_LDK.shape[2], weights.down_LDF.shape[2]
    require(not (why := misfit(D, H, F, K // H, C // H)), why)
    pairs, hidden, groups, P = PAIRS.value, HIDDEN_COLUMNS.value, G.value, D // COLUMNS.value
    qkv = weights.qkv_LCD.view(L, C // H, 2, H // 2 // pairs, pairs, D).transpose(2, 3).reshape(L, C, D)
    gate_up = weights.gate_up_LCD.view(L, 2, P, hidden, D).transpose(1, 2).reshape(L, 2 * F, D)
    size = CHUNK_ROWS.value * CHUNK_WIDTH.value
    of_qkv = packed_tiles(qkv, 2 * pairs, groups, BK_D).view(L, -1, D // (groups * BK_D), size)
    # Gate and up of a step of K stand one behind the other.
    of_gate_up = packed_tiles(gate_up, hidden, groups, BK_D).view(L, P, 2, -1, size).transpose(2, 3).flatten(2, 3)
    return in_rows(
        [
            of_qkv,
            packed_tiles(weights.out_LDK, COLUMNS.value, groups, BK_OUT).view(L, P, -1, size),
            of_gate_up,
            packed_tiles(weights.down_LDF, COLUMNS.value, groups, BK_F).view(L, P, -1, size),
        ]
    )


def in_rows(chunks: Sequence[Tensor]) -> Tensor:
    """Each program's chunks one behind the other, [P, L, CHUNKS, size], of [L, P, .., size] for each product.

    Of the first some programs may have none: zeros stand behind all of theirs.
    """
    first, *others = chunks
    lacking, without = first.shape[1:3]
    L, P, size = others[0].shape[0], others[0].shape[1], first.shape[3]
    padded = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, P - lacking))
    ring = torch.cat([padded, *others], dim=2).transpose(0, 1).contiguous()
    theirs = ring[lacking:, :, without:].flatten(1)
    ring[lacking:] = torch.nn.functional.pad(theirs, (0, L * without * size)).view_as(ring[lacking:])
    return ring


def query_heads(D: int, P: int, chunks: int, H: int) -> int:
    """Of a model whose programs have so many chunks of a layer: those of w_out tell."""
    groups: int = G.value
    F: int = HIDDEN_COLUMNS.value * P
    of_out: int = chunks - 3 * D // (groups * BK_D) - F // (groups * BK_F)
    return of_out * groups * BK_OUT // H


def unpacked_ring(weights_PLCV: Tensor, D: int, H: int, heads: int) -> Weights:
    """The weights as `packed_ring` was given them; heads: of keys and values together."""
    P, L, chunks, _ = weights_PLCV.shape
    F, K = HIDDEN_COLUMNS.value * P, query_heads(D, P, chunks, H) * H
    sizes = [(L, K + heads * H, D), (L, D, K), (L, 2 * F, D), (L, D, F)]
    return unordered(weights_PLCV, sizes, lambda plain: packed_ring(plain, H))


def misfit(D: int, H: int, F: int, N: int, heads: int) -> str:
    """Why the kernel cannot take a model of these widths, with so many heads of q, k and v; "" if it can."""
    groups = G.value
    odd = [f"{name} = {size}" for name, size, unit in (
        ("D", D, groups * BK_D), ("N H", N * H, groups * BK_OUT), ("F", F, groups * BK_F)
    ) if size % unit]  # fmt: skip
    if odd:
        return f"{' and '.join(odd)}: no multiple of what {groups} warps take at a time"
    if D // COLUMNS.value != F // HIDDEN_COLUMNS.value:
        return f"F = {F} is not {HIDDEN_COLUMNS.value // COLUMNS.value} D: programs would have unlike tiles"
    if heads * H // (2 * PAIRS.value) > D // COLUMNS.value:
        return f"{heads} heads of {H} have more tiles than there are programs"
    if H != 256:
        return f"a head dim of {H}: keys and values are read in an order that is for 256"
    phases = [D // (groups * BK_D), 0, 0, N * H // (groups * BK_OUT), 2 * D // (groups * BK_D), F // (groups * BK_F)]
    return "" if scheduled(phases) else f"phases that take {phases} chunks: not what the ring's weights are asked for"


def scheduled(phases: Sequence[int]) -> bool:
    """Whether programs with a tile of w_qkv and those without can go on for ever, if phases take so many chunks.

    That is so where a layer asks for as many as it takes, what a phase takes has been asked for, and never more stands
    in the ring than it has room for.
    """
    for own in (phases[0], 0):
        asks = [ASK_QKV.value, ASK_ATTENTION.value, ASK_MIXING.value, ASK_OUT.value, own, ASK_DOWN.value]
        ahead = own + ASK_DOWN.value
        for takes, asking in zip((own, *phases[1:]), asks, strict=True):
            if takes > ahead or ahead - takes + asking > SLOTS.value:
                return False
            ahead += asking - takes
        if ahead != own + ASK_DOWN.value:
            return False
    return True
