"""Attention of a denoising step in one launch: few rows over many keys, split over keys and combined by who comes last.

    out = softmax(scale q k^T, HIDDEN where a key is hidden) v

A program takes BM rows (tokens times the heads of one key/value head) against one block of BN keys, and one of COLUMNS
shares of the values' columns, for which it computes the scores again. It leaves m, l and acc of `attention` for its
block; the program of its rows and columns that comes last weighs all blocks, in the order of the keys. So equal inputs
give equal bits, and there is no second kernel to combine them.

Keys and values that stood in the cache before the chain of kernels began (`settled`) are read before waiting for the
kernel in front, which writes those behind them. The axes' letters are those of `attention`.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.ahead import ask, asked
from pi0exp.kernels.attention import HIDDEN, attend_reference
from pi0exp.kernels.attention_cases import GEMMA, Heads, attention_case
from pi0exp.kernels.attention_launch import check_arguments
from pi0exp.kernels.dependent import dependent, launch_behind
from pi0exp.kernels.kernel import INTERPRETED, AheadOfTime, Case, Kernel, launchable, require
from pi0exp.kernels.skinny_gemm import Launch, check_counters
from pi0exp.kernels.stream import counters_on
from pi0exp.kernels.stream_launch import OTHER_ATTENTION, START, Attend, attention_launch

TOGETHER = 4
"""Parts that the program that comes last reads at a time."""


def stream_attention_reference(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float, settled: int,
    counters: Tensor, ahead: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attend_reference`; what is settled changes nothing."""
    return attend_reference(q_BTNH, k_BSKH, v_BSKH, keys_BS, blind, scale)


@triton.jit
def stream_attention_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, out_ptr, acc_ptr, stats_ptr, counters_ptr, ahead_ptr, ahead_pieces,
    k_b, k_s, k_k, v_b, v_s, v_k, keys_b, keys_s, T, S, parts, settled, scale,
    GROUP: tl.constexpr, HEADS_KV: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, HELD: tl.constexpr,
    MASKED: tl.constexpr, BLIND: tl.constexpr, HIDDEN: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, parts x COLUMNS, B x HEADS_KV). acc is [tiles, parts, BM, HEAD], stats [tiles, COLUMNS,
    parts, 2, BM], of all batches' tiles."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    WIDE: tl.constexpr = HEAD // COLUMNS
    part = tl.program_id(1) // COLUMNS
    column = tl.program_id(1) % COLUMNS
    batch = (tl.program_id(2) // HEADS_KV).to(tl.int64)
    head_kv = tl.program_id(2) % HEADS_KV
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    h, c = tl.arange(0, HEAD), column * WIDE + tl.arange(0, WIDE)
    first = part * BN
    key = tl.minimum(first + tl.arange(0, BN), S - 1)
    k_rows = k_ptr + batch * k_b + head_kv * k_k + key * k_s
    v_rows = v_ptr + batch * v_b + head_kv * v_k + key * v_s
    if HELD:
        early = (key < settled)[:, None]
        k = tl.load(k_rows[:, None] + h[None, :], mask=early & (h < H)[None, :], other=0.0)
        v = tl.load(v_rows[:, None] + c[None, :], mask=early & (c < H)[None, :], other=0.0)
    if ahead_ptr is not None:
        ask(ahead_ptr, ahead_pieces)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HELD:
        if first + BN > settled:
            k = tl.load(k_rows[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
            v = tl.load(v_rows[:, None] + c[None, :], mask=(c < H)[None, :], other=0.0)
    else:
        k = tl.load(k_rows[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
        v = tl.load(v_rows[:, None] + c[None, :], mask=(c < H)[None, :], other=0.0)
    # Rows and keys beyond the last are the last once more: stored twice is stored the same.
    r = tl.arange(0, BM)
    row = tl.minimum(tl.program_id(0) * BM + r, T * GROUP - 1)
    token, head = row // GROUP, head_kv * GROUP + row % GROUP
    row_at = ((batch * T + token) * (GROUP * HEADS_KV) + head) * H
    q = tl.load(q_ptr + row_at[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (tl.cast(scale, tl.float32) * 1.4426950408889634)
    if MASKED:
        seen = tl.load(keys_ptr + batch * keys_b + key * keys_s).to(tl.int1)
        scores = tl.where(seen[None, :], scores, HIDDEN)
    if BLIND:
        scores = tl.where((token == 0)[:, None] & (key > S - T)[None, :], HIDDEN, scores)
    # Not HIDDEN: a key that is there a second time must not count even in a row that may see none.
    scores = tl.where((first + tl.arange(0, BN) < S)[None, :], scores, float("-inf"))
    largest = tl.max(scores, 1)
    probs = tl.exp2(scores - largest[:, None])
    total = tl.sum(probs, 1)
    probs = probs.to(v.dtype)
    if UPCAST:
        probs, v = probs.to(tl.float32), v.to(tl.float32)
    acc = tl.dot(probs, v, input_precision="ieee")

    acc_at = acc_ptr + tile.to(tl.int64) * parts * BM * HEAD + r[:, None] * HEAD + c[None, :]
    stats_at = stats_ptr + (tile * COLUMNS + column) * parts * 2 * BM
    tl.store(acc_at + part * BM * HEAD, acc)
    tl.store(stats_at + part * 2 * BM + r, largest)
    tl.store(stats_at + part * 2 * BM + BM + r, total)
    # As in `skinny_gemm.summed`: all have stored before one counts.
    tl.debug_barrier()
    counter = counters_ptr + tile * COLUMNS + column
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        tl.store(counter, 0)
        p_P = tl.arange(0, PADDED)[:, None]
        all_stats = stats_at + p_P * 2 * BM + r[None, :]
        m_P = tl.load(all_stats, mask=p_P < parts, other=float("-inf"), cache_modifier=".cg")
        l_P = tl.load(all_stats + BM, mask=p_P < parts, other=0.0, cache_modifier=".cg")
        top = tl.max(m_P, 0)
        norm = 1.0 / tl.sum(l_P * tl.exp2(m_P - top[None, :]), 0)
        out = tl.zeros((BM, WIDE), tl.float32)
        for chunk in range(0, parts, TOGETHER):
            # Several at a time: their loads do not wait for one another.
            for i in tl.static_range(TOGETHER):
                one = chunk + i
                there = r < (one < parts).to(tl.int32) * BM
                m_one = tl.load(stats_at + one * 2 * BM + r, mask=there, other=float("-inf"), cache_modifier=".cg")
                acc_one = tl.load(acc_at + one * BM * HEAD, mask=there[:, None], other=0.0, cache_modifier=".cg")
                out += acc_one * (tl.exp2(m_one - top) * norm)[:, None]
        to = out_ptr + row_at[:, None] + c[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=(c < H)[None, :])


@triton_op("pi0exp::stream_attention", mutates_args=("counters",))
def stream_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float, settled: int,
    counters: Tensor, ahead: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same as `attend_dense`, with the same arguments and errors, for few rows; q contiguous.

    settled: so many keys were complete before the chain of kernels began. counters: as in `skinny_gemm`. ahead: as in
    `stream`.
    """
    check_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS)
    require(q_BTNH.is_contiguous(), "q must be contiguous")
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    require(0 <= settled <= S, f"{settled} of {S} keys are settled")
    launch = attention_launch(T * N // K, q_BTNH)
    tiles, parts = triton.cdiv(T * N // K, launch.BM), triton.cdiv(S, launch.BN)
    head = max(16 * launch.COLUMNS, triton.next_power_of_2(H))
    check_counters(counters, tiles * B * K * launch.COLUMNS)
    out_BTNH = torch.empty_like(q_BTNH)
    acc = q_BTNH.new_empty((B * K * tiles, parts, launch.BM, head), dtype=torch.float32)
    stats = q_BTNH.new_empty((B * K * tiles, launch.COLUMNS, parts, 2, launch.BM), dtype=torch.float32)
    keys = q_BTNH if keys_BS is None else keys_BS  # not read if there is none, but a pointer it must be
    pdl = dependent(q_BTNH, launch.pdl)
    launchable(stream_attention_kernel)[(tiles, parts * launch.COLUMNS, B * K)](
        q_ptr=q_BTNH, k_ptr=k_BSKH, v_ptr=v_BSKH, keys_ptr=keys, out_ptr=out_BTNH, acc_ptr=acc, stats_ptr=stats,
        counters_ptr=counters, **asked(ahead, pdl, B * T),
        k_b=k_BSKH.stride(0), k_s=k_BSKH.stride(1), k_k=k_BSKH.stride(2), v_b=v_BSKH.stride(0),
        v_s=v_BSKH.stride(1), v_k=v_BSKH.stride(2), keys_b=keys.stride(0), keys_s=keys.stride(1), T=T, S=S, parts=parts,
        settled=settled, scale=scale, GROUP=N // K, HEADS_KV=K, H=H, HEAD=head, COLUMNS=launch.COLUMNS, BM=launch.BM,
        BN=launch.BN, PADDED=triton.next_power_of_2(parts), TOGETHER=TOGETHER, HELD=launch.HELD,
        MASKED=keys_BS is not None, BLIND=blind, HIDDEN=HIDDEN, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=1, **launch_behind(pdl),
    )  # fmt: skip
    return out_BTNH


# ---- cases


def _case(name: str, heads: Heads, *, T: int, S: int, settled: int, **more: Any) -> Case:
    """A case of `attend_split` with so many settled keys."""
    case = attention_case(name, heads, T=T, S=S, **more)

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        return (*case.make(generator, device), settled, counters_on(device))

    return Case(case.name, make, case.flops, case.bytes_moved, case.pi0, case.small, case.mutates, case.terms)


def _ahead(name: str, launch: Launch | Attend, **constants: Any) -> AheadOfTime:
    assert isinstance(launch, Attend)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16:16") | {"keys_ptr": "*i1:16"}
    types |= {"acc_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "counters_ptr": "*i32:16", "scale": "fp32"}
    types |= dict.fromkeys(("k_b", "k_s", "k_k", "v_b", "v_s", "v_k"), "i32:16")
    types |= dict.fromkeys(("keys_b", "keys_s", "T", "S", "parts", "settled"), "i32")
    fixed: dict[str, Any] = {
        "GROUP": 8, "HEADS_KV": 1, "H": 256, "HEAD": 256, "COLUMNS": launch.COLUMNS, "BM": launch.BM, "BN": launch.BN,
        "PADDED": triton.next_power_of_2(triton.cdiv(839, launch.BN)), "HELD": launch.HELD, "MASKED": True,
        "TOGETHER": TOGETHER, "BLIND": True, "HIDDEN": HIDDEN, "PDL": False, "UPCAST": False,
    } | constants  # fmt: skip
    fixed |= {} if fixed["PDL"] else {"ahead_ptr": None}
    types |= {"ahead_ptr": "*bf16:16", "ahead_pieces": "i32"}
    types = {name: kind for name, kind in types.items() if name not in fixed}
    targets = ("sm_90",) if fixed["PDL"] else ("gfx942", "gfx950", "sm_90")
    return AheadOfTime(name, stream_attention_kernel, types, fixed, launch.num_warps, 1, dots=True, targets=targets)


_small = partial(_case, small=True)

KERNELS = (
    Kernel(
        "stream_attention",
        stream_attention,
        stream_attention_reference,
        cases=(
            _case("denoise, 10 actions", GEMMA, T=11, S=799, settled=788, blind=True, room=839),
            _case("denoise, 10 actions without the state token", GEMMA, T=10, S=799, settled=788, room=839),
            _case("denoise, 50 actions", GEMMA, T=51, S=839, settled=788, blind=True, room=839),
            _case("denoise, 50 actions, prompt of 200", GEMMA, T=50, S=1018, settled=968, room=1018),
            _case("denoise, middle camera absent", GEMMA, T=11, S=799, settled=788, blind=True, hidden=(256, 512)),
            _case("denoise, batch of 3", GEMMA, B=3, T=11, S=799, settled=0, blind=True, room=839, pi0=False),
            _case("in float32", GEMMA, T=11, S=150, settled=139, pi0=False, dtype=torch.float32),
            _small("small, blind", Heads(8, 1, 32), T=3, S=70, settled=67, room=80, blind=True),
            _small("small, blind, float32", Heads(4, 1, 32), T=3, S=40, settled=16, blind=True, dtype=torch.float32),
            _small("small, hidden part, batch", Heads(4, 2, 32), B=2, T=2, S=37, settled=20, hidden=(0, 19)),
            _small("small, one part, padded heads", Heads(2, 2, 20), T=2, S=11, settled=0),
        ),
        ahead_of_time=(
            _ahead("any GPU", OTHER_ATTENTION),
            _ahead("10 actions, dependent launch", START["sm_90"]["stream_attention 128"], PDL=True),
            _ahead("50 actions, dependent launch", START["sm_90"]["stream_attention 512"], PDL=True),
        ),
    ),
)  # fmt: skip
