"""Queries, keys and values of a denoising step in one launch: product, norm, rotation, and the write into the cache.

    z = (xs w^T) / rms + offset            w: the matrices of queries, keys and values, one under the other
    q, k of z with the pairs (d, d + H/2) turned, as in `rope_qkv`; k and v go to rows start to start + T of the cache

A tile has both halves of its pairs: columns d to d + BN / 2 of a head, and those H/2 further on. The norm's scheme, and
the axes' letters, stand in `stream`; N query heads, K key/value heads, H head dim, S rows of the cache.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.kernel import Case, Kernel, random, require, wide
from pi0exp.kernels.rope_qkv import rotated_reference
from pi0exp.kernels.skinny_gemm import OTHERS, Launch, halves, summed
from pi0exp.kernels.stream import (
    check_squares,
    check_vector,
    compiled_stream,
    counters_on,
    inverse_rms,
    inverse_rms_reference,
    launch_stream,
    positive,
    rows_of,
)
from pi0exp.kernels.stream_launch import START, product_launch


def stream_qkv_reference(
    xs_BTD: Tensor,
    squares_PM: Tensor,
    weight_CD: Tensor,
    offset_C: Tensor | None,
    cos_BT1H: Tensor,
    sin_BT1H: Tensor,
    room_k_BSKH: Tensor,
    room_v_BSKH: Tensor,
    start: int,
    eps: float,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> Tensor:
    """The maths above: queries [B, T, N, H]; keys and values stand in the rooms."""
    (B, T, D), (K, H) = xs_BTD.shape, room_k_BSKH.shape[2:]
    dtype = wide(xs_BTD, offset_C)
    z_BTC = F.linear(xs_BTD.to(dtype), weight_CD.to(dtype)) * inverse_rms_reference(squares_PM, D, eps, B, T, 1)
    z_BTC = z_BTC if offset_C is None else z_BTC + offset_C
    q_BTNH, k_BTKH, v_BTKH = z_BTC.unflatten(-1, (-1, H)).tensor_split((-2 * K, -K), dim=2)
    room_k_BSKH[:, start : start + T] = rotated_reference(k_BTKH, cos_BT1H, sin_BT1H)
    room_v_BSKH[:, start : start + T] = v_BTKH
    return rotated_reference(q_BTNH, cos_BT1H, sin_BT1H).to(xs_BTD.dtype)


@triton.jit
def stream_qkv_kernel(
    x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, squares_ptr, offset_ptr, cos_ptr, sin_ptr,
    q_ptr, k_ptr, v_ptr, M, K, T, start, eps, cos_B, cos_T, sin_B, sin_T, k_B, k_S, k_K, v_B, v_S, v_K,
    HEADS: tl.constexpr, HEADS_KV: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, X_LEFT: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """BN / 2 pairs of one head: grid (heads x tiles of a head, SPLITS), queries first, then keys, then values."""
    PAIRS: tl.constexpr = BN // 2
    per_head = tl.cdiv(HALF, PAIRS)
    head = tl.program_id(0) // per_head
    first = (tl.program_id(0) % per_head) * PAIRS
    r_R = tl.arange(0, BN)
    of_R = first + r_R % PAIRS
    # Pairs past the end read pair 0 again; they are not stored.
    row_R = head * 2 * HALF + tl.where(of_R < HALF, of_R, 0) + (r_R // PAIRS) * HALF
    acc, last = summed(
        x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, row_R, M, K, K,
        BN, BM, BK, STEPS, SPLITS, GROUPS, HELD, X_LEFT, PDL, EVEN_K, UPCAST,
    )  # fmt: skip
    if last:
        m_M = tl.arange(0, BM)
        d_1P = (first + tl.arange(0, PAIRS))[None, :]
        inside = (m_M < M)[:, None] & (d_1P < HALF)
        low, high = halves(acc, BM, PAIRS)
        by_row = inverse_rms(squares_ptr, m_M, M, K, eps, TILES, PADDED)[:, None]
        low, high = low * by_row, high * by_row
        if offset_ptr is not None:
            at = offset_ptr + head * 2 * HALF + d_1P
            low += tl.load(at, mask=d_1P < HALF, other=0.0)
            high += tl.load(at + HALF, mask=d_1P < HALF, other=0.0)
        b_M1, t_M1 = (m_M // T)[:, None], (m_M % T)[:, None]
        if head < HEADS + HEADS_KV:
            cos = tl.load(cos_ptr + b_M1 * cos_B + t_M1 * cos_T + d_1P, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + b_M1 * sin_B + t_M1 * sin_T + d_1P, mask=inside, other=0.0).to(tl.float32)
            low, high = low * cos - high * sin, high * cos + low * sin
        kind = q_ptr.dtype.element_ty
        if head < HEADS:
            to = q_ptr + (m_M[:, None] * HEADS + head) * 2 * HALF + d_1P
            tl.store(to, low.to(kind), mask=inside)
            tl.store(to + HALF, high.to(kind), mask=inside)
        elif head < HEADS + HEADS_KV:
            to = k_ptr + b_M1.to(tl.int64) * k_B + (start + t_M1) * k_S + (head - HEADS) * k_K + d_1P
            tl.store(to, low.to(kind), mask=inside)
            tl.store(to + HALF, high.to(kind), mask=inside)
        else:
            to = v_ptr + b_M1.to(tl.int64) * v_B + (start + t_M1) * v_S + (head - HEADS - HEADS_KV) * v_K + d_1P
            tl.store(to, low.to(kind), mask=inside)
            tl.store(to + HALF, high.to(kind), mask=inside)


@triton_op("pi0exp::stream_qkv", mutates_args=("room_k_BSKH", "room_v_BSKH", "counters"))
def stream_qkv(
    xs_BTD: Tensor,
    squares_PM: Tensor,
    weight_CD: Tensor,
    offset_C: Tensor | None,
    cos_BT1H: Tensor,
    sin_BT1H: Tensor,
    room_k_BSKH: Tensor,
    room_v_BSKH: Tensor,
    start: int,
    eps: float,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> Tensor:
    """Queries [B, T, N, H], contiguous; keys and values go to rows start to start + T of the rooms.

    xs: [B, T, D] and squares: float32 [P, B T], of `stream_begin` or `stream_residual`. weight: [(N + 2 K) H, D] of
    xs's dtype. offset: float32 [(N + 2 K) H] or None. cos, sin: [B or 1, T, 1, H], any dtype, both halves alike. rooms:
    [B, S, K, H], values of a head adjacent. counters: as in `skinny_gemm`. ahead: as in
    `stream`. At most 64 rows. Raises ValueError.
    """
    x_MK = rows_of(xs_BTD, weight_CD)
    (B, T, _), (S, K, H) = xs_BTD.shape, room_k_BSKH.shape[1:]
    C = weight_CD.shape[0]
    check_squares(squares_PM, B * T)
    check_vector("offset", offset_C, C)
    require(H % 2 == 0 and C % H == 0 and C // H > 2 * K, f"{C} rows are no heads of {H} and {K} keys and values")
    require(room_k_BSKH.shape == room_v_BSKH.shape == (B, S, K, H), "the rooms do not fit the tokens")
    require(room_k_BSKH.dtype == room_v_BSKH.dtype == xs_BTD.dtype, "the rooms are of another dtype than x")
    require(room_k_BSKH.stride(3) == room_v_BSKH.stride(3) == 1, "values of a head must be adjacent in the rooms")
    require(0 <= start <= S - T, f"rows {start} to {start + T} of a room of {S}")
    for turn in (cos_BT1H, sin_BT1H):
        fits = turn.shape in ((B, T, 1, H), (1, T, 1, H)) and turn.stride(3) == 1
        require(fits, f"{tuple(turn.shape)} turns no [{B}, {T}, {C // H - 2 * K}, {H}]")
    launch = product_launch("stream_qkv", B * T, weight_CD)
    q_BTNH = xs_BTD.new_empty((B, T, C // H - 2 * K, H))
    tiles = (C // H) * triton.cdiv(H // 2, launch.BN // 2)
    launch_stream(
        stream_qkv_kernel, launch, x_MK, weight_CD, counters, ahead, tiles, launch.BN,
        squares_ptr=squares_PM, offset_ptr=offset_C, cos_ptr=cos_BT1H, sin_ptr=sin_BT1H, q_ptr=q_BTNH,
        k_ptr=room_k_BSKH, v_ptr=room_v_BSKH, T=T, start=start, eps=eps,
        **_strides("cos", cos_BT1H), **_strides("sin", sin_BT1H),
        k_B=room_k_BSKH.stride(0), k_S=room_k_BSKH.stride(1), k_K=room_k_BSKH.stride(2),
        v_B=room_v_BSKH.stride(0), v_S=room_v_BSKH.stride(1), v_K=room_v_BSKH.stride(2),
        HEADS=C // H - 2 * K, HEADS_KV=K, HALF=H // 2, TILES=squares_PM.shape[0],
        PADDED=triton.next_power_of_2(squares_PM.shape[0]),
    )  # fmt: skip
    return q_BTNH


def _strides(name: str, turn: Tensor) -> dict[str, int]:
    return {f"{name}_B": 0 if turn.shape[0] == 1 else turn.stride(0), f"{name}_T": turn.stride(1)}


# ---- cases


def _arguments(
    generator: torch.Generator, device: torch.device, shape: tuple[int, ...], room: tuple[int, int], tiles: int,
    turns: int, offset: bool, dtype: torch.dtype, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    B, T, D, N, K, H = shape
    S, start = room
    C = (N + 2 * K) * H
    angle = math.pi * random(generator, device, turns, T, 1, H // 2, dtype=torch.float32)
    keys_values = random(generator, device, B, S, 2, K, H, dtype=dtype)
    return (
        random(generator, device, B, T, D, dtype=dtype),
        positive(generator, device, tiles, B * T, D),
        random(generator, device, C, D, dtype=dtype) * D**-0.5,
        random(generator, device, C, dtype=torch.float32) if offset else None,
        *(torch.cat([x, x], dim=-1).to(dtype) for x in (angle.cos(), angle.sin())),
        *keys_values.unbind(2),
        start,
        eps,
        counters_on(device),
    )


def _case(
    name: str, B: int, T: int, D: int, N: int, K: int, H: int, *, room: tuple[int, int], tiles: int, turns: int = 1,
    offset: bool = False, dtype: torch.dtype = torch.bfloat16, small: bool = False, pi0: bool = False,
) -> Case:  # fmt: skip
    C, M = (N + 2 * K) * H, B * T
    moved = (C * D + M * (C + D)) * dtype.itemsize + 2.0 * turns * T * H * dtype.itemsize
    make = partial(
        _arguments, shape=(B, T, D, N, K, H), room=room, tiles=tiles, turns=turns, offset=offset, dtype=dtype,
        eps=1e-6 if pi0 else 0.5,
    )  # fmt: skip
    return Case(name, make, 2.0 * M * C * D, moved, pi0=pi0, small=small, mutates=(6, 7), terms=D)


_TYPES = {
    **dict.fromkeys(("cos_ptr", "sin_ptr", "q_ptr", "k_ptr", "v_ptr"), "*bf16:16"),
    **dict.fromkeys(("squares_ptr", "offset_ptr"), "*fp32:16"),
    **dict.fromkeys(("cos_B", "cos_T", "sin_B", "sin_T", "k_B", "k_S", "k_K", "v_B", "v_S", "v_K"), "i32:16"),
    **{"T": "i32", "start": "i32", "eps": "fp32"},
}
_FIXED = {"HEADS": 8, "HEADS_KV": 1, "HALF": 128, "TILES": 64, "PADDED": 64}


def _ahead(name: str, launch: Any, rows: int, **constants: Any) -> Any:
    return compiled_stream(name, stream_qkv_kernel, launch, rows, 1024, dict(_TYPES), **_FIXED, **constants)


KERNELS = (
    Kernel(
        "stream_qkv",
        stream_qkv,
        stream_qkv_reference,
        cases=(
            *(
                _case(f"denoise {T} behind {S}", 1, T, 1024, 8, 1, 256, room=(S + T, S), tiles=64, offset=o, pi0=True)
                for T, S, o in ((11, 788, False), (10, 789, False), (51, 788, False), (50, 968, True))
            ),
            _case("batch of 2, 40 rows", 2, 20, 1024, 8, 1, 256, room=(830, 788), tiles=64, turns=2),
            _case("small", 1, 3, 32, 8, 1, 32, room=(7, 2), tiles=2, small=True),
            _case("small, batch, offset", 2, 3, 40, 2, 2, 20, room=(5, 0), tiles=3, turns=2, offset=True, small=True),
            _case("small, float32", 2, 2, 40, 2, 1, 36, room=(4, 1), tiles=3, offset=True, dtype=torch.float32,
                small=True),
            _case("17 rows, float16", 1, 17, 64, 2, 1, 32, room=(20, 3), tiles=1, dtype=torch.float16, small=True),
        ),
        ahead_of_time=(
            _ahead("any GPU", OTHERS, 11, offset_ptr=None),
            _ahead("held and split, offset", Launch(32, 128, SPLITS=4, HELD=True), 50),
            _ahead("10 rows, dependent launch", START["sm_90"]["stream_qkv 16 2560x1024"], 10, offset_ptr=None,
                PDL=True),
            _ahead("50 rows, dependent launch", START["sm_90"]["stream_qkv 64 2560x1024"], 50, PDL=True),
        ),
    ),
)  # fmt: skip
