"""What the persistent kernel of a denoising step does between meetings (`stream_layers`): the phases of a layer.

A phase reads what others wrote in the phase before, so past the L1 of its own multiprocessor (`.cg`). Its weights do
not depend on anything: `held` reads them before the meeting, and they arrive while the program waits for the others.

Shapes: M rows (at most ROWS), D width of the residual stream, K width in, R rows of a tile of a weight, G warps that
share K, N query heads, H head dim; in a kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Triton takes no annotated variables)

import triton
import triton.language as tl

from pi0exp.kernels.gemm_epilogue import activate
from pi0exp.kernels.skinny_gemm import halves
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS, ROWS, place

# ---- products, whose operands lie in memory as `stream_pack` says


@triton.jit
def held(
    before, weight_ptr, me, TILES: tl.constexpr, PROGRAMS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """`before`, and behind it the tiles of a weight that are this program's, none of which is waited for: of all its
    turns chunk FIRST of K, and so on until LAST. Where there are no more tiles the last is read once more."""
    SIZE: tl.constexpr = R * G * BK
    i = tl.arange(0, SIZE)
    tiles = before  # type: Any
    for step in tl.static_range(FIRST, LAST):
        for turn in tl.static_range((TILES + PROGRAMS - 1) // PROGRAMS):
            tile = tl.minimum(me + turn * PROGRAMS, TILES - 1)
            # Not unpacked, as the linter would have it: Triton's language has no such expression.
            tiles = tiles + (tl.load(weight_ptr + tile * (R * K) + step * SIZE + i, cache_modifier=".cg"),)  # noqa: RUF005
    return tiles


@triton.jit
def times(
    x_ptr, M, tiles, turn: tl.constexpr, TURNS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x w^T, [M, R], of the tile of a turn. The warps' sums are added in the order of K."""
    SIZE: tl.constexpr = ROWS * G * BK
    i = tl.arange(0, SIZE)
    there = (i // (G * 256)) % 2 * 8 + (i // 32) % 8 < M
    acc = tl.zeros((G, ROWS, R), tl.float32)
    for step in tl.static_range(K // (G * BK)):
        x = tl.load(x_ptr + step * SIZE + i, mask=there, other=0.0, cache_modifier=".cg")
        x = tl.permute(tl.reshape(x, (BK // 32, 2, G, 8, 4, 2, 2, 2)), (2, 1, 3, 0, 5, 6, 4, 7))
        x = tl.reshape(x, (G, ROWS, BK))
        w = tl.reshape(tiles[step * TURNS + turn], (R // 8, BK // 32, G, 8, 4, 2, 2, 2))
        w = tl.reshape(tl.permute(w, (2, 1, 5, 6, 4, 7, 0, 3)), (G, BK, R))
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    # Halved by halves: `tl.sum` over warps leaves every warp the whole sum, and whatever is made of it is made 8 times.
    acc = tl.permute(acc, (1, 2, 0))
    if G >= 8:
        acc = halved(acc, ROWS, R, 8)
    if G >= 4:
        acc = halved(acc, ROWS, R, 4)
    if G >= 2:
        acc = halved(acc, ROWS, R, 2)
    return tl.reshape(acc, (ROWS, R))


@triton.jit
def halved(acc, ROWS: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """[M, R, G / 2], the sums of neighbours."""
    even, odd = tl.split(tl.reshape(acc, (ROWS, R, G // 2, 2)))
    return even + odd


# ---- phases


@triton.jit
def project(
    z, tile, by_row, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
    HEADS: tl.constexpr, HEADS_KV: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """PAIRS pairs of one head, [M, 2 PAIRS] of the product: norm, rotation, and the way to q, k or v."""
    HALF: tl.constexpr = H // 2
    head = tile // (HALF // PAIRS)
    d_1P = ((tile % (HALF // PAIRS)) * PAIRS + tl.arange(0, PAIRS))[None, :]
    m_M1 = tl.arange(0, ROWS)[:, None]
    inside = (m_M1 < M) & (d_1P < HALF)
    low, high = halves(z, ROWS, PAIRS)
    low, high = low * by_row[:, None], high * by_row[:, None]
    if offset_ptr is not None:
        low += tl.load(offset_ptr + head * H + d_1P)
        high += tl.load(offset_ptr + head * H + HALF + d_1P)
    if head < HEADS + HEADS_KV:
        cos = tl.load(cos_ptr + m_M1 * cos_T + d_1P, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + m_M1 * sin_T + d_1P, mask=inside, other=0.0).to(tl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    kind = q_ptr.dtype.element_ty
    if head < HEADS:
        to = q_ptr + (m_M1 * HEADS + head) * H + d_1P
    elif head < HEADS + HEADS_KV:
        to = k_ptr + (start + m_M1) * k_S + (head - HEADS) * H + d_1P
    else:
        to = v_ptr + (start + m_M1) * v_S + (head - HEADS - HEADS_KV) * H + d_1P
    tl.store(to, low.to(kind), mask=inside)
    tl.store(to + HALF, high.to(kind), mask=inside)


@triton.jit
def block_of(at_ptr, first, begin, end, stride, head_kv, H: tl.constexpr, BN: tl.constexpr):
    """BN rows of the keys or values from `first` on, those from `begin` to `end`; others are zeros."""
    key = first + tl.arange(0, BN)
    at = at_ptr + head_kv * H + key[:, None] * stride + tl.arange(0, H)[None, :]
    return tl.load(at, mask=((key >= begin) & (key < end))[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def attend(
    q_ptr, k, v, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale,
    HEADS: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, BLIND: tl.constexpr,
    HIDDEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One head's rows against one block of BN keys. acc: [HEADS, parts, ROWS, H]; stats: [HEADS, 2, parts, ROWS]."""
    head, part = item // parts, item % parts
    m_M, key = tl.arange(0, ROWS), part * BN + tl.arange(0, BN)
    h = tl.arange(0, H)
    at = q_ptr + (m_M[:, None] * HEADS + head) * H + h[None, :]
    q = tl.load(at, mask=(m_M < M)[:, None], other=0.0, cache_modifier=".cg")
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (tl.cast(scale, tl.float32) * 1.4426950408889634)
    if MASKED:
        seen = tl.load(keys_ptr + key, mask=key < S, other=0).to(tl.int1)
        scores = tl.where(seen[None, :], scores, HIDDEN)
    if BLIND:
        scores = tl.where((m_M == 0)[:, None] & (key > S - M)[None, :], HIDDEN, scores)
    scores = tl.where((key < S)[None, :], scores, float("-inf"))  # not HIDDEN: these are no keys at all
    largest = tl.max(scores, 1)
    probs = tl.exp2(scores - largest[:, None])
    total = tl.sum(probs, 1)
    probs = probs.to(v.dtype)
    if UPCAST:
        probs, v = probs.to(tl.float32), v.to(tl.float32)
    acc = tl.dot(probs, v, input_precision="ieee")
    tl.store(acc_ptr + ((head * parts + part) * ROWS + m_M[:, None]) * H + h[None, :], acc)
    tl.store(stats_ptr + (head * 2 * parts + part) * ROWS + m_M, largest)
    tl.store(stats_ptr + (head * 2 * parts + parts + part) * ROWS + m_M, total)


@triton.jit
def mix(
    acc_ptr, stats_ptr, mixed_ptr, item, parts, HEADS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr,
    G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """MIXED columns of one head from all its parts, weighed in the order of the keys. PARTS: at least `parts`."""
    head, c = item // (H // MIXED), (item % (H // MIXED)) * MIXED + tl.arange(0, MIXED)
    m_M1 = tl.arange(0, ROWS)[:, None]
    # A part after the other, so that each thread has its values of all of them, and none waits for another's.
    largest = ()  # type: Any
    totals = ()  # type: Any
    accs = ()  # type: Any
    for part in tl.static_range(PARTS):
        there = m_M1 < tl.where(part < parts, ROWS, 0)
        at = stats_ptr + (head * 2 * parts + part) * ROWS + m_M1
        largest = largest + (tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
        totals = totals + (tl.load(at + parts * ROWS, mask=there, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
        at = acc_ptr + ((head * parts + part) * ROWS + m_M1) * H + c[None, :]
        accs = accs + (tl.load(at, mask=there, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    top = largest[0]
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, largest[part])
    total = tl.zeros((ROWS, 1), tl.float32)
    out_MC = tl.zeros((ROWS, MIXED), tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp2(largest[part] - top)
        total += totals[part] * weight
        out_MC += accs[part] * weight
    out_MC = out_MC / total
    to = mixed_ptr + place(m_M1, head * H + c[None, :], G, BK)
    tl.store(to, out_MC.to(mixed_ptr.dtype.element_ty))


@triton.jit
def add(
    branch, tile, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_ptr, out_ptr, squares_ptr, M, ending,
    D: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the residual stream: gate, sum, and what the norm to come needs, as in `stream_residual`.

    ending: rows of xs that also go to out, [M, D]: 0 or all.
    """
    m_M = tl.arange(0, ROWS)
    n_1N = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (m_M < M)[:, None]
    at = m_M[:, None] * D + n_1N
    if gate_ptr is not None:
        branch *= tl.load(gate_ptr + n_1N).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    x = tl.where(inside, branch + tl.load(from_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0)
    rounded = x.to(kind)
    tl.store(x_ptr + at, rounded, mask=inside)
    scale = 1.0 + tl.load(scale_ptr + n_1N).to(tl.float32)
    xs = (rounded.to(tl.float32) * scale).to(kind)
    tl.store(xs_ptr + place(m_M[:, None], n_1N, G, BK), xs)
    tl.store(out_ptr + at, xs, mask=m_M[:, None] < ending)
    tl.store(squares_ptr + tile * M + m_M, tl.sum(x * x, axis=1), mask=m_M < M)


@triton.jit
def gate(
    z, tile, by_row, offset_ptr, hidden_ptr, F: tl.constexpr, G: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """HIDDEN_COLUMNS columns of gelu_tanh(gate) * up."""
    m_M1 = tl.arange(0, ROWS)[:, None]
    n_1N = (tile * HIDDEN_COLUMNS + tl.arange(0, HIDDEN_COLUMNS))[None, :]
    gated, up = halves(z, ROWS, HIDDEN_COLUMNS)
    gated, up = gated * by_row[:, None], up * by_row[:, None]
    if offset_ptr is not None:
        gated += tl.load(offset_ptr + n_1N)
        up += tl.load(offset_ptr + F + n_1N)
    y = activate(gated, "gelu_tanh") * up
    tl.store(hidden_ptr + place(m_M1, n_1N, G, BK), y.to(hidden_ptr.dtype.element_ty))
