"""What the phases of `stream_ring` and `stream_wide` have in common: all but where their operands lie.

In Gluon; rows and layouts are the caller's. Shapes: M rows (at most ROWS), D width of the residual stream, N query
heads, H head dim, F hidden width, S rows of the cache; in a kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Gluon takes no annotated variables)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pi0exp.kernels.gemm_epilogue import activate
from pi0exp.kernels.stream_pack import MIXED, PAIRS


@gluon.jit
def inverse_rms(squares_ptr, M, D, eps, TILES: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """1 / rms of the rows, whose sums of squares are [TILES, M]. LAYOUT: of [ROWS, TILES]."""
    t_T = gl.arange(0, TILES, layout=gl.SliceLayout(0, LAYOUT))
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    inside = (m_M < M)[:, None] & (t_T >= 0)[None, :]
    squares = gl.load(squares_ptr + t_T[None, :] * M + m_M[:, None], mask=inside, other=0.0, cache_modifier=".cg")
    return gl.rsqrt(gl.sum(squares, axis=1) / D + gl.cast(eps, gl.float32))


@gluon.jit
def deliver(
    low, high, by_row, tile, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
    HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """PAIRS pairs of one head, whose halves are low and high: norm, rotation, and the way to q, k or v.

    LAYOUT: of [ROWS, PAIRS], that of both halves.
    """
    HALF: gl.constexpr = H // 2
    by_row = gl.convert_layout(by_row, gl.SliceLayout(1, LAYOUT))
    head = tile // (HALF // PAIRS)
    d_1P = ((tile % (HALF // PAIRS)) * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, LAYOUT)))[None, :]
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
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


@gluon.jit
def softmax(
    scores, part, keys_ptr, M, S, scale,
    ROWS: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr, MASKED: gl.constexpr, BLIND: gl.constexpr,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    """Of a block of BN keys, the `part`-th: exp2 of the scores, their largest and their sum. LAYOUT: of the scores."""
    scores *= gl.cast(scale, gl.float32) * 1.4426950408889634
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    key = part * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
    if MASKED:
        seen = gl.load(keys_ptr + key, mask=key < S, other=0).to(gl.int1)
        scores = gl.where(seen[None, :], scores, HIDDEN)
    if BLIND:
        scores = gl.where((m_M == 0)[:, None] & (key > S - M)[None, :], HIDDEN, scores)
    scores = gl.where((key < S)[None, :], scores, float("-inf"))  # not HIDDEN: these are no keys at all
    largest = gl.max(scores, 1)
    probs = gl.exp2(scores - largest[:, None])
    return probs, largest, gl.sum(probs, 1)


@gluon.jit
def weighed(
    acc_ptr, stats_ptr, head, column, parts, rows, m_M1,
    H: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """MIXED columns of one head from all its parts, weighed in the order of the keys. PARTS: at least `parts`.

    acc: [HEADS, parts, ROWS, H]; stats: [HEADS, 2, parts, ROWS], of which the first `rows` rows are there.
    """
    # A part after the other, so that each thread has its values of all of them, and none waits for another's.
    largest = ()  # type: Any
    totals = ()  # type: Any
    accs = ()  # type: Any
    for part in gl.static_range(PARTS):
        there = m_M1 < gl.where(part < parts, rows, 0)
        at = stats_ptr + (head * 2 * parts + part) * ROWS + m_M1
        largest = largest + (gl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
        totals = totals + (gl.load(at + parts * ROWS, mask=there, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
        at = acc_ptr + ((head * parts + part) * ROWS + m_M1) * H + column
        accs = accs + (gl.load(at, mask=there & (column >= 0), other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    top = largest[0]
    for part in gl.static_range(1, PARTS):
        top = gl.maximum(top, largest[part])
    total = gl.zeros([ROWS, 1], gl.float32, layout=LAYOUT)
    out = gl.zeros([ROWS, MIXED], gl.float32, layout=LAYOUT)
    for part in gl.static_range(PARTS):
        weight = gl.exp2(largest[part] - top)
        total += totals[part] * weight
        out += accs[part] * weight
    return out / total


@gluon.jit
def settle(
    branch, m_M, n_1N, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_at, out_ptr, squares_ptr, tile, M, ending,
    D: gl.constexpr,
):  # fmt: skip
    """Columns n of the residual stream: gate, sum, and what the norm to come needs, as in `stream_residual`.

    xs_at: where xs of all ROWS rows go, zeros for those that are not there. ending: rows of xs that also go to out, [M,
    D]: 0 or all.
    """
    inside = (m_M < M)[:, None] & (n_1N < D)
    at = m_M[:, None] * D + n_1N
    if gate_ptr is not None:
        branch *= gl.load(gate_ptr + n_1N).to(gl.float32)
    kind = x_ptr.dtype.element_ty
    x = gl.where(inside, branch + gl.load(from_ptr + at, mask=inside, other=0.0).to(gl.float32), 0.0)
    rounded = x.to(kind)
    gl.store(x_ptr + at, rounded, mask=inside)
    scale = 1.0 + gl.load(scale_ptr + n_1N).to(gl.float32)
    xs = (rounded.to(gl.float32) * scale).to(kind)
    gl.store(xs_at, xs)
    gl.store(out_ptr + at, xs, mask=inside & (m_M < ending)[:, None])
    gl.store(squares_ptr + tile * M + m_M, gl.sum(x * x, axis=1), mask=m_M < M)


@gluon.jit
def activated(gated, up, by_row, n_1N, offset_ptr, F: gl.constexpr):
    """gelu_tanh(gate) * up of columns n: norm, activation."""
    gated, up = gated * by_row[:, None], up * by_row[:, None]
    if offset_ptr is not None:
        gated += gl.load(offset_ptr + n_1N)
        up += gl.load(offset_ptr + F + n_1N)
    return activate(gated, "gelu_tanh") * up
