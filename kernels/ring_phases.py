"""The phases of a layer in the persistent kernel with a ring (`stream_ring`), as those of `stream_phases`.

Shapes: M rows (at most ROWS), D width of the residual stream, N query heads, H head dim; in a kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Gluon takes no annotated variables)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from pi0exp.kernels.ring import (
    CACHE,
    FLAT,
    FLAT_4,
    PRODUCT,
    ROWS,
    SCORES,
    SCORES_LEFT,
    SCORES_RIGHT,
    SQUARES,
    SUMS_32,
    SUMS_PAIRS,
    TILE_8,
    TILE_16,
    TILE_32,
    G,
    take,
)  # fmt: skip
from pi0exp.kernels.step_phases import activated, deliver, inverse_rms, settle, softmax, weighed
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS, place


@gluon.jit
def project(
    x, ring, ready, taken, tile, squares_ptr, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, eps,
    cos_T, sin_T, k_S, v_S,
    D: gl.constexpr, HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr, BK: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """PAIRS pairs of one head: product, norm, rotation, and the way to q, k or v."""
    by_row = inverse_rms(squares_ptr, M, D, eps, TILES, ROWS, SQUARES)
    acc = gl.zeros([G, ROWS, 2 * PAIRS], gl.float32, layout=PRODUCT)
    for step in gl.static_range(D // (G * BK)):
        acc = mma_v2(x[step], take(ring, ready, taken + step, 2 * PAIRS, BK), acc)
    acc = gl.reshape(gl.permute(acc, [1, 2, 0]), [ROWS, 2, PAIRS, G])
    z = gl.sum(gl.convert_layout(gl.permute(acc, [0, 2, 1, 3]), SUMS_PAIRS), axis=3)
    low, high = gl.split(z)
    low, high = gl.convert_layout(low, TILE_16), gl.convert_layout(high, TILE_16)
    deliver(
        low, high, by_row, tile, offset_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, M, start, cos_T, sin_T, k_S, v_S,
        HEADS, HEADS_KV, H, ROWS, TILE_16,
    )  # fmt: skip


# Keys and values, too, are read into the lanes that multiply them, 16 and 8 bytes at once: what a product sums over,
# and the columns of its result, may be in any order, if its other side, and who reads the result, knows it.
#
#     the c-th of what scores sum over is h = 32 a + 8 l + 4 d + 2 e + f      c = 32 a + 16 d + 8 e + 2 l + f
#     column n of the attended values is h = 32 w + 4 l + j                   n = 64 j + 8 w + l


@gluon.jit
def keys_of(at_ptr, first, begin, end, stride, head_kv, H: gl.constexpr, BN: gl.constexpr):
    """BN keys from `first` on, [H in the order c, BN]; those from `begin` to `end`, others are zeros."""
    i = gl.arange(0, BN * H, layout=FLAT)
    key = first + i // 32 % BN
    h = i // (32 * BN) * 32 + i % 32
    inside = (key >= begin) & (key < end)
    k = gl.load(at_ptr + head_kv * H + key * stride + h, mask=inside, other=0.0, cache_modifier=".cg")
    k = gl.permute(gl.reshape(k, [H // 32, BN, 4, 2, 2, 2]), [0, 3, 4, 2, 5, 1])
    return gl.convert_layout(gl.reshape(k, [H, BN]), SCORES_RIGHT, assert_trivial=True)


@gluon.jit
def values_of(at_ptr, first, begin, end, stride, head_kv, H: gl.constexpr, BN: gl.constexpr):
    """BN values likewise, [BN, H in the order n]."""
    i = gl.arange(0, BN * H, layout=FLAT_4)
    key = first + i // (16 * H) * 16 + i // (8 * H) % 2 * 8 + i // 4 % 4 * 2 + i // (4 * H) % 2
    h = i // 16 % (H // 4) * 4 + i % 4
    inside = (key >= begin) & (key < end)
    v = gl.load(at_ptr + head_kv * H + key * stride + h, mask=inside, other=0.0, cache_modifier=".cg")
    v = gl.permute(gl.reshape(v, [BN // 16, 2, 2, H // 32, 8, 4, 4]), [0, 1, 5, 2, 6, 3, 4])
    return gl.convert_layout(gl.reshape(v, [BN, H]), SCORES_RIGHT, assert_trivial=True)


@gluon.jit
def queries_of(q_ptr, head, M, HEADS: gl.constexpr, H: gl.constexpr):
    """The rows of a head; zeros where there is no such head."""
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, CACHE))
    h = gl.arange(0, H, layout=gl.SliceLayout(0, CACHE))
    inside = ((m_M < M) & (head < HEADS))[:, None] & (h >= 0)[None, :]
    return gl.load(q_ptr + (m_M[:, None] * HEADS + head) * H + h[None, :], mask=inside, other=0.0, cache_modifier=".cg")


@gluon.jit
def attend(
    q, k, v, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale,
    HEADS: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, MASKED: gl.constexpr, BLIND: gl.constexpr,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    """One head's rows against one block of BN keys. acc: [HEADS, parts, ROWS, H in the order n]; stats: [HEADS, 2,
    parts, ROWS].
    """
    head, part = item // parts, item % parts
    q = gl.permute(gl.reshape(q, [ROWS, H // 32, 4, 2, 2, 2]), [0, 1, 3, 4, 2, 5])
    q = gl.convert_layout(gl.reshape(q, [ROWS, H]), SCORES_LEFT)
    scores = mma_v2(q, k, gl.zeros([ROWS, BN], gl.float32, layout=SCORES))
    probs, largest, total = softmax(
        scores, part, keys_ptr, M, S, scale, ROWS, BN, SCORES, MASKED, BLIND, HIDDEN
    )  # fmt: skip
    probs = gl.convert_layout(probs.to(gl.bfloat16), SCORES_LEFT)
    acc = mma_v2(probs, v, gl.zeros([ROWS, H], gl.float32, layout=SCORES))
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    n = gl.arange(0, H, layout=gl.SliceLayout(0, SCORES))
    gl.store(acc_ptr + ((head * parts + part) * ROWS + m_M[:, None]) * H + n[None, :], acc)
    gl.store(stats_ptr + (head * 2 * parts + part) * ROWS + m_M, largest)
    gl.store(stats_ptr + (head * 2 * parts + parts + part) * ROWS + m_M, total)


@gluon.jit
def mix(
    acc_ptr, stats_ptr, mixed_ptr, item, parts, HEADS: gl.constexpr, H: gl.constexpr, PARTS: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    """MIXED columns n of one head from all its parts, weighed in the order of the keys. PARTS: at least `parts`."""
    head = item // (H // MIXED)
    n = (item % (H // MIXED)) * MIXED + gl.arange(0, MIXED, layout=gl.SliceLayout(0, TILE_16))[None, :]
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_16))[:, None]
    out = weighed(acc_ptr, stats_ptr, head, n, parts, ROWS, m_M1, H, PARTS, ROWS, TILE_16)
    h = n // 8 % (H // 32) * 32 + n % 8 * 4 + n // (H // 4)
    gl.store(mixed_ptr + place(m_M1, head * H + h, G, BK), out.to(mixed_ptr.dtype.element_ty))


@gluon.jit
def add(
    branch, tile, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_ptr, out_ptr, squares_ptr, M, ending,
    D: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the residual stream: gate, sum, and what the norm to come needs, as in `stream_residual`.

    branch: in TILE_8. ending: rows of xs that also go to out, [M, D]: 0 or all.
    """
    m_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_8))
    n_1N = (tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, TILE_8)))[None, :]
    xs_at = xs_ptr + place(m_M[:, None], n_1N, G, BK)
    settle(branch, m_M, n_1N, gate_ptr, from_ptr, scale_ptr, x_ptr, xs_at, out_ptr, squares_ptr, tile, M, ending, D)


@gluon.jit
def hide(
    x, ring, ready, taken, tile, squares_ptr, offset_ptr, hidden_ptr, M, eps,
    D: gl.constexpr, F: gl.constexpr, BK: gl.constexpr, BK_F: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """HIDDEN_COLUMNS columns of gelu_tanh(gate) * up: product, norm, activation. Chunks of gate and up take turns."""
    by_row = gl.convert_layout(inverse_rms(squares_ptr, M, D, eps, TILES, ROWS, SQUARES), gl.SliceLayout(1, TILE_32))
    gated = gl.zeros([G, ROWS, HIDDEN_COLUMNS], gl.float32, layout=PRODUCT)
    up = gl.zeros([G, ROWS, HIDDEN_COLUMNS], gl.float32, layout=PRODUCT)
    for step in gl.static_range(D // (G * BK)):
        gated = mma_v2(x[step], take(ring, ready, taken + 2 * step, HIDDEN_COLUMNS, BK), gated)
        up = mma_v2(x[step], take(ring, ready, taken + 2 * step + 1, HIDDEN_COLUMNS, BK), up)
    gated = gl.convert_layout(gl.sum(gl.convert_layout(gl.permute(gated, [1, 2, 0]), SUMS_32), axis=2), TILE_32)
    up = gl.convert_layout(gl.sum(gl.convert_layout(gl.permute(up, [1, 2, 0]), SUMS_32), axis=2), TILE_32)
    m_M1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE_32))[:, None]
    n_1N = (tile * HIDDEN_COLUMNS + gl.arange(0, HIDDEN_COLUMNS, layout=gl.SliceLayout(0, TILE_32)))[None, :]
    y = activated(gated, up, by_row, n_1N, offset_ptr, F)
    gl.store(hidden_ptr + place(m_M1, n_1N, G, BK_F), y.to(hidden_ptr.dtype.element_ty))
