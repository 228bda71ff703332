"""Attention with an online softmax: the maths, the reference and the Triton code of `attend_dense` and `attend_split`.

    out = softmax(scale q k^T, HIDDEN where a key is hidden) v

Keys come in blocks. A row keeps the largest score m so far, the sum l of exp2(score - m) and the sum acc of those times
v; a block with a larger score first shrinks l and acc by exp2(m_old - m_new), and out = acc / l in the end (Milakov and
Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Scores are scaled by log2(e) too, for the sake of exp2.

The query heads that share a key/value head are rows of one tile, so its keys and values are read once for all of them.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.dependent import wait_for_front
from pi0exp.kernels.kernel import wide

HIDDEN = -1.0e38
"""The score of a hidden key, in float32's range: a row that may see no key becomes the mean of all values, not NaN."""


def attend_reference(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """[B, T, N, H] of q's dtype; statistics in float32 or wider.

    keys_BS: bool, False for keys that nobody may see; None if all may be seen. blind: the first query sees only the
    keys before the last T and itself, which is key S - T.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtype = wide(q_BTNH, k_BSKH, v_BSKH)
    q_BTKGH = q_BTNH.to(dtype).unflatten(2, (K, N // K))
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.to(dtype)) * scale
    seen_BTS = torch.ones(B, T, S, dtype=torch.bool, device=q_BTNH.device)
    if keys_BS is not None:
        seen_BTS &= keys_BS[:, None]
    if blind:
        seen_BTS[:, 0, S - T + 1 :] = False
    probs_BKGTS = scores_BKGTS.masked_fill(~seen_BTS[:, None, None], HIDDEN).softmax(dim=-1)
    return torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH.to(dtype)).reshape(B, T, N, H).to(q_BTNH.dtype)


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    out_ptr,
    stats_ptr,
    q_b,
    k_b,
    v_b,
    keys_b,
    keys_s,
    T,
    S,
    heads_kv,
    part_keys,
    scale,
    Q_T: tl.constexpr,
    Q_N: tl.constexpr,
    K_S: tl.constexpr,
    K_K: tl.constexpr,
    V_S: tl.constexpr,
    V_K: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
    BLIND: tl.constexpr,
    HIDDEN: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: BLOCK_M rows of one key/value head against `part_keys` keys.

    The head dim is HEAD columns, which are padded if HEAD > H, and then TAIL more, if TAIL, padded if HEAD + TAIL > H.
    With PARTS == 1 `out` is the result [B, T, N, H]. Otherwise it is float32 acc [B, T, N, PARTS, H], and `stats` is
    float32 [B, T, N, PARTS, 2]: m and l.

    Strides of tokens and heads are constants, for the compiler to see how far addresses are aligned: it asks of
    arguments only whether 16 divides them, which is not so for heads of 72, and would load value by value.
    """
    wait_for_front(PDL)
    batch = (tl.program_id(2) // heads_kv).to(tl.int64)
    head_kv = tl.program_id(2) % heads_kv
    part = tl.program_id(1)
    # Rows and keys beyond the last are the last once more: no mask in any load, and stored twice is stored the same.
    row = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), T * GROUP - 1)
    token = row // GROUP
    head = head_kv * GROUP + row % GROUP
    h = tl.arange(0, HEAD)
    q_rows = q_ptr + batch * q_b + token * Q_T + head * Q_N
    q = tl.load(q_rows[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL:
        h_tail = HEAD + tl.arange(0, TAIL)
        q_tail = tl.load(q_rows[:, None] + h_tail[None, :], mask=(h_tail < H)[None, :], other=0.0)
        if UPCAST:
            q_tail = q_tail.to(tl.float32)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Inductor hands floats over as float64, which would widen every score.
    to_log2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    first = part * part_keys
    for start in range(first, tl.minimum(first + part_keys, S), BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < S
        key = tl.minimum(start + tl.arange(0, BLOCK_N), S - 1)
        k_rows = k_ptr + batch * k_b + head_kv * K_K + key * K_S
        v_rows = v_ptr + batch * v_b + head_kv * V_K + key * V_S
        k = tl.load(k_rows[None, :] + h[:, None], mask=(h < H)[:, None], other=0.0)
        # Ahead of its use, so that both are on their way while a part of a single block waits.
        v = tl.load(v_rows[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee")
        if TAIL:
            k_tail = tl.load(k_rows[None, :] + h_tail[:, None], mask=(h_tail < H)[:, None], other=0.0)
            if UPCAST:
                k_tail = k_tail.to(tl.float32)
            scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
        scores = scores * to_log2
        if MASKED:
            seen = tl.load(keys_ptr + batch * keys_b + key * keys_s).to(tl.int1)
            scores = tl.where(seen[None, :], scores, HIDDEN)
        if BLIND:
            scores = tl.where((token == 0)[:, None] & (key > S - T)[None, :], HIDDEN, scores)
        # Not HIDDEN: a key that is there a second time must not count even in a row that may see none.
        scores = tl.where(inside[None, :], scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        probs = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(probs, 1)
        largest = larger
        probs = probs.to(v.dtype)
        if UPCAST:
            probs, v = probs.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(probs, v, acc * shrink[:, None], input_precision="ieee")
        if TAIL:
            v_tail = tl.load(v_rows[:, None] + h_tail[None, :], mask=(h_tail < H)[None, :], other=0.0)
            if UPCAST:
                v_tail = v_tail.to(tl.float32)
            acc_tail = tl.dot(probs, v_tail, acc_tail * shrink[:, None], input_precision="ieee")

    # As int64: with several parts there may be more than 2^31 values.
    place = ((batch * T + token) * (heads_kv * GROUP) + head) * PARTS + part
    if PARTS == 1:
        acc = acc / total[:, None]
        if TAIL:
            acc_tail = acc_tail / total[:, None]
    else:
        tl.store(stats_ptr + place * 2, largest)
        tl.store(stats_ptr + place * 2 + 1, total)
    out_rows = out_ptr + place * H
    kind = out_ptr.dtype.element_ty
    tl.store(out_rows[:, None] + h[None, :], acc.to(kind), mask=(h < H)[None, :])
    if TAIL:
        tl.store(out_rows[:, None] + h_tail[None, :], acc_tail.to(kind), mask=(h_tail < H)[None, :])
