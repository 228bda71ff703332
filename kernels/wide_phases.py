"""The phases of a layer in the persistent kernel for many rows (`stream_wide`).

Shapes: M rows (at most ROWS), D width of the residual stream, N query heads, H head dim, S rows of the cache; in a
kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Gluon takes no annotated variables)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from pi0exp.kernels.ring import barrier
from pi0exp.kernels.step_phases import activated, deliver, settle, softmax, weighed
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS
from pi0exp.kernels.wide import (
    BOX,
    BOX_ROWS,
    BOXES,
    PROBS,
    ROWS,
    SUMS_64,
    TILE_8,
    TILE_16,
    TILE_32,
    place,
)  # fmt: skip


@gluon.jit
def project(
    z, tile, by_row, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
    HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """PAIRS pairs of one head, halves in turns: norm, rotation, and the way to q, k or v."""
    low, high = gl.split(gl.reshape(z, [ROWS, PAIRS, 2]))
    low, high = gl.convert_layout(low, TILE_16), gl.convert_layout(high, TILE_16)
    deliver(
        low, high, by_row, tile, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
        HEADS, HEADS_KV, H, ROWS, TILE_16,
    )  # fmt: skip


# Queries, keys and values of a block stand in the slots of x, which is not there meanwhile.
QUERIES, KEYS, VALUES = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def keep(rows, slot: gl.constexpr, at_ptr, first, end, stride):
    """Into a slot, ROWS rows of BOXES * BOX values from row `first` on; zeros for those from `end` on."""
    i = gl.arange(0, BOXES * ROWS, layout=gl.SliceLayout(1, BOX_ROWS))[:, None]
    column = i // ROWS * BOX + gl.arange(0, BOX, layout=gl.SliceLayout(0, BOX_ROWS))[None, :]
    row = first + i % ROWS
    inside = (row < end) & (column >= 0)
    values = gl.load(at_ptr + row * stride + column, mask=inside, other=0.0, cache_modifier=".cg")
    rows.index(slot).store(values)


@gluon.jit
def keep_block(rows, room_ptr, item, parts, end, stride, HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr):
    """The keys and values of an item; those of the cache from row `end` on as zeros."""
    at_ptr = room_ptr + (item // parts) // (HEADS // HEADS_KV) * H
    keep(rows, KEYS, at_ptr, (item % parts) * ROWS, end, stride)
    keep(rows, VALUES, at_ptr + HEADS_KV * H, (item % parts) * ROWS, end, stride)


@gluon.jit
def attend(
    rows, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale,
    H: gl.constexpr, MASKED: gl.constexpr, BLIND: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """One head's rows against one block of ROWS keys, which were kept.

    acc: [HEADS, parts, ROWS, H]; stats: [HEADS, 2, parts, ROWS].
    """
    fence_async_shared()
    barrier()
    head, part = item // parts, item % parts
    scores = gl.zeros([ROWS, ROWS], gl.float32, layout=SUMS_64)
    for i in gl.static_range(BOXES):
        k = rows.index(KEYS).slice(i * ROWS, ROWS).permute([1, 0])
        scores = warpgroup_mma(rows.index(QUERIES).slice(i * ROWS, ROWS), k, scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    probs, largest, total = softmax(
        scores, part, keys_ptr, M, S, scale, ROWS, ROWS, SUMS_64, MASKED, BLIND, HIDDEN
    )  # fmt: skip
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS_64))
    gl.store(stats_ptr + (head * 2 * parts + part) * ROWS + m_M, largest)
    gl.store(stats_ptr + (head * 2 * parts + parts + part) * ROWS + m_M, total)
    probs = gl.convert_layout(probs.to(gl.bfloat16), PROBS)
    n = gl.arange(0, BOX, layout=gl.SliceLayout(0, SUMS_64))
    at = acc_ptr + ((head * parts + part) * ROWS + m_M[:, None]) * H + n[None, :]
    for i in gl.static_range(BOXES):
        acc = gl.zeros([ROWS, BOX], gl.float32, layout=SUMS_64)
        acc = warpgroup_mma(probs, rows.index(VALUES).slice(i * ROWS, ROWS), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.store(at + i * BOX, acc, mask=(m_M < M)[:, None] & (n >= 0)[None, :])
    barrier()  # nobody reads the slots any more


@gluon.jit
def mix(
    acc_ptr, stats_ptr, mixed_ptr, item, parts, M, HEADS: gl.constexpr, H: gl.constexpr, PARTS: gl.constexpr
):  # fmt: skip
    """MIXED columns of one head from all its parts, weighed in the order of the keys. PARTS: at least `parts`."""
    head = item // (H // MIXED)
    h = (item % (H // MIXED)) * MIXED + gl.arange(0, MIXED, layout=gl.SliceLayout(0, TILE_16))[None, :]
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_16))[:, None]
    out = weighed(acc_ptr, stats_ptr, head, h, parts, M, m_M1, H, PARTS, ROWS, TILE_16)
    at = mixed_ptr + place(m_M1, head * H + h)
    gl.store(at, out.to(mixed_ptr.dtype.element_ty), mask=(m_M1 < M) & (h >= 0))


@gluon.jit
def leave_sums(acc, sums_ptr, tile, part, M, D: gl.constexpr):
    """A part of K's sums for BOX columns of the residual stream; sums: [parts, ROWS, D]."""
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS_64))
    n = tile * BOX + gl.arange(0, BOX, layout=gl.SliceLayout(0, SUMS_64))
    at = sums_ptr + (part * ROWS + m_M[:, None]) * D + n[None, :]
    gl.store(at, acc, mask=(m_M < M)[:, None] & (n < D)[None, :])


@gluon.jit
def add(
    sums_ptr, tile, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_ptr, out_ptr, squares_ptr, M, ending,
    D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the residual stream: PARTS parts of a product, gate, sum, and what the norm to come needs.

    ending: rows of xs that also go to out, [M, D]: 0 or all.
    """
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_8))
    n_1N = (tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, TILE_8)))[None, :]
    inside = (m_M < M)[:, None] & (n_1N < D)
    at = m_M[:, None] * D + n_1N
    branch = gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE_8)
    for part in gl.static_range(PARTS):
        branch += gl.load(sums_ptr + part * ROWS * D + at, mask=inside, other=0.0, cache_modifier=".cg")
    xs_at = xs_ptr + place(m_M[:, None], n_1N)
    settle(branch, m_M, n_1N, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_at, out_ptr, squares_ptr, tile, M, ending, D)


@gluon.jit
def hide(z, tile, by_row, offset_ptr, hidden_ptr, M, F: gl.constexpr):
    """HIDDEN_COLUMNS columns of gelu_tanh(gate) * up, in turns: norm, activation."""
    gated, up = gl.split(gl.reshape(z, [ROWS, HIDDEN_COLUMNS, 2]))
    gated, up = gl.convert_layout(gated, TILE_32), gl.convert_layout(up, TILE_32)
    by_row = gl.convert_layout(by_row, gl.SliceLayout(1, TILE_32))
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_32))[:, None]
    n_1N = (tile * HIDDEN_COLUMNS + gl.arange(0, HIDDEN_COLUMNS, layout=gl.SliceLayout(0, TILE_32)))[None, :]
    y = activated(gated, up, by_row, n_1N, offset_ptr, F)
    gl.store(hidden_ptr + place(m_M1, n_1N), y.to(hidden_ptr.dtype.element_ty), mask=(m_M1 < M) & (n_1N < F))
