"""The phases of a layer in the persistent kernel for many rows (`stream_wide`).

Shapes: M rows (at most ROWS), D width of the residual stream, N query heads, H head dim, S rows of the cache; in a
kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Gluon takes no annotated variables)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from pi0exp.kernels.gemm_epilogue import activate
from pi0exp.kernels.ring import barrier
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS
from pi0exp.kernels.wide import (
    BOX,
    BOX_ROWS,
    BOXES,
    PROBS,
    ROWS,
    SQUARES,
    SUMS_64,
    TILE_8,
    TILE_16,
    TILE_32,
    place,
)  # fmt: skip


@gluon.jit
def inverse_rms(squares_ptr, M, D, eps, TILES: gl.constexpr):
    """1 / rms of the rows, whose sums of squares are [TILES, M]."""
    t_T = gl.arange(0, TILES, layout=gl.SliceLayout(0, SQUARES))
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARES))
    inside = (m_M < M)[:, None] & (t_T >= 0)[None, :]
    squares = gl.load(squares_ptr + t_T[None, :] * M + m_M[:, None], mask=inside, other=0.0, cache_modifier=".cg")
    return gl.rsqrt(gl.sum(squares, axis=1) / D + gl.cast(eps, gl.float32))


@gluon.jit
def project(
    z, tile, by_row, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
    HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """PAIRS pairs of one head, halves in turns: norm, rotation, and the way to q, k or v."""
    HALF: gl.constexpr = H // 2
    low, high = gl.split(gl.reshape(z, [ROWS, PAIRS, 2]))
    low, high = gl.convert_layout(low, TILE_16), gl.convert_layout(high, TILE_16)
    by_row = gl.convert_layout(by_row, gl.SliceLayout(1, TILE_16))
    head = tile // (HALF // PAIRS)
    d_1P = ((tile % (HALF // PAIRS)) * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, TILE_16)))[None, :]
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_16))[:, None]
    inside = (m_M1 < M) & (d_1P < HALF)
    low, high = low * by_row[:, None], high * by_row[:, None]
    if offset_ptr is not None:
        low += gl.load(offset_ptr + head * H + d_1P)
        high += gl.load(offset_ptr + head * H + HALF + d_1P)
    if head < HEADS + HEADS_KV:
        cos = gl.load(cos_ptr + m_M1 * cos_T + d_1P, mask=inside, other=0.0).to(gl.float32)
        sin = gl.load(sin_ptr + m_M1 * sin_T + d_1P, mask=inside, other=0.0).to(gl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    kind = q_ptr.dtype.element_ty
    if head < HEADS:
        to = q_ptr + (m_M1 * HEADS + head) * H + d_1P
    elif head < HEADS + HEADS_KV:
        to = k_ptr + (start + m_M1) * k_S + (head - HEADS) * H + d_1P
    else:
        to = v_ptr + (start + m_M1) * v_S + (head - HEADS - HEADS_KV) * H + d_1P
    gl.store(to, low.to(kind), mask=inside)
    gl.store(to + HALF, high.to(kind), mask=inside)


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
    scores *= gl.cast(scale, gl.float32) * 1.4426950408889634
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS_64))
    key = part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, SUMS_64))
    if MASKED:
        visible = gl.load(keys_ptr + key, mask=key < S, other=0).to(gl.int1)
        scores = gl.where(visible[None, :], scores, HIDDEN)
    if BLIND:
        scores = gl.where((m_M == 0)[:, None] & (key > S - M)[None, :], HIDDEN, scores)
    scores = gl.where((key < S)[None, :], scores, float("-inf"))  # not HIDDEN: these are no keys at all
    largest = gl.max(scores, 1)
    probs = gl.exp2(scores - largest[:, None])
    total = gl.sum(probs, 1)
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
    # A part after the other, so that each thread has its values of all of them, and none waits for another's.
    largest = ()  # type: Any
    totals = ()  # type: Any
    accs = ()  # type: Any
    for part in gl.static_range(PARTS):
        inside = m_M1 < gl.where(part < parts, M, 0)
        at = stats_ptr + (head * 2 * parts + part) * ROWS + m_M1
        largest = largest + (gl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
        totals = totals + (gl.load(at + parts * ROWS, mask=inside, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
        at = acc_ptr + ((head * parts + part) * ROWS + m_M1) * H + h
        accs = accs + (gl.load(at, mask=inside & (h >= 0), other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    top = largest[0]
    for part in gl.static_range(1, PARTS):
        top = gl.maximum(top, largest[part])
    total = gl.zeros([ROWS, 1], gl.float32, layout=TILE_16)
    out = gl.zeros([ROWS, MIXED], gl.float32, layout=TILE_16)
    for part in gl.static_range(PARTS):
        weight = gl.exp2(largest[part] - top)
        total += totals[part] * weight
        out += accs[part] * weight
    out = out / total
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
    if gate_ptr is not None:
        branch *= gl.load(gate_ptr + n_1N).to(gl.float32)
    kind = x_ptr.dtype.element_ty
    x = gl.where(inside, branch + gl.load(from_ptr + at, mask=inside, other=0.0).to(gl.float32), 0.0)
    rounded = x.to(kind)
    gl.store(x_ptr + at, rounded, mask=inside)
    scale = 1.0 + gl.load(scale_ptr + n_1N).to(gl.float32)
    xs = (rounded.to(gl.float32) * scale).to(kind)
    gl.store(xs_ptr + place(m_M[:, None], n_1N), xs, mask=inside)
    gl.store(out_ptr + at, xs, mask=inside & (m_M < ending)[:, None])
    gl.store(squares_ptr + tile * M + m_M, gl.sum(x * x, axis=1), mask=m_M < M)


@gluon.jit
def hide(z, tile, by_row, offset_ptr, hidden_ptr, M, F: gl.constexpr):
    """HIDDEN_COLUMNS columns of gelu_tanh(gate) * up, in turns: norm, activation."""
    gated, up = gl.split(gl.reshape(z, [ROWS, HIDDEN_COLUMNS, 2]))
    gated, up = gl.convert_layout(gated, TILE_32), gl.convert_layout(up, TILE_32)
    by_row = gl.convert_layout(by_row, gl.SliceLayout(1, TILE_32))
    gated, up = gated * by_row[:, None], up * by_row[:, None]
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_32))[:, None]
    n_1N = (tile * HIDDEN_COLUMNS + gl.arange(0, HIDDEN_COLUMNS, layout=gl.SliceLayout(0, TILE_32)))[None, :]
    if offset_ptr is not None:
        gated += gl.load(offset_ptr + n_1N)
        up += gl.load(offset_ptr + F + n_1N)
    y = activate(gated, "gelu_tanh") * up
    gl.store(hidden_ptr + place(m_M1, n_1N), y.to(hidden_ptr.dtype.element_ty), mask=(m_M1 < M) & (n_1N < F))
