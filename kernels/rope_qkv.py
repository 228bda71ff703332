"""Rotary embedding of queries and keys, with values beside them, out of one fused projection in one launch.

The pairs (d, d + H/2) turn: low' = low cos - high sin, high' = high cos + low sin, in float32 and rounded once; values
are copied. Keys and values go to tensors of their own or straight into rows of a cache.

Shapes: B batch, T tokens, S rows of the cache, N query heads, K key/value heads, H head dim, R heads (of any tokens) of
a program, D half a head.
"""

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import FLOATS, AheadOfTime, Case, Kernel, launchable, random, require, wide

LAUNCH: dict[str, dict[str, int]] = {
    "few": {"ROWS": 2, "num_warps": 1},  # 16 bytes a thread of either half
    "many": {"ROWS": 8, "num_warps": 4},
}
"""Chosen on an H200 (Triton 3.6, 2026-11-24); neighbours differ by a few percent."""
MANY_HEADS = 4096


def rotated_reference(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """x with every pair (d, d + H/2) turned."""
    low, high = x_BTNH.to(wide(x_BTNH, cos_BT1H)).chunk(2, dim=-1)
    cos, sin = cos_BT1H.chunk(2, dim=-1)[0], sin_BT1H.chunk(2, dim=-1)[0]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BTNH.dtype)


def rope_qkv_reference(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and a copy of the values."""
    return (
        rotated_reference(q_BTNH, cos_BT1H, sin_BT1H),
        rotated_reference(k_BTKH, cos_BT1H, sin_BT1H),
        v_BTKH.clone(memory_format=torch.contiguous_format),
    )


def rope_qkv_cached_reference(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    cos_BT1H: Tensor,
    sin_BT1H: Tensor,
    room_k_BSKH: Tensor,
    room_v_BSKH: Tensor,
    start: int,
) -> Tensor:
    """Queries turned; keys turned and values stand in rows start to start + T of the rooms."""
    end = start + q_BTNH.shape[1]
    room_k_BSKH[:, start:end] = rotated_reference(k_BTKH, cos_BT1H, sin_BT1H)
    room_v_BSKH[:, start:end] = v_BTKH
    return rotated_reference(q_BTNH, cos_BT1H, sin_BT1H)


@triton.jit
def _turn(
    x_ptr, x_T, x_N, cos_ptr, cos_T, sin_ptr, sin_T, out_ptr, out_T, out_N, start, r_R1, d_1D, inside, HEADS, HALF
):
    """Turns the heads r_R1 of a tensor with HEADS heads a token, from rows of x to rows of out from `start` on."""
    t_R1, n_R1 = r_R1 // HEADS, r_R1 % HEADS
    x_RD = x_ptr + t_R1 * x_T + n_R1 * x_N + d_1D
    out_RD = out_ptr + (start + t_R1) * out_T + n_R1 * out_N + d_1D
    low_RD = tl.load(x_RD, mask=inside, other=0.0).to(tl.float32)
    high_RD = tl.load(x_RD + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_RD = tl.load(cos_ptr + t_R1 * cos_T + d_1D, mask=inside, other=0.0).to(tl.float32)
    sin_RD = tl.load(sin_ptr + t_R1 * sin_T + d_1D, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_RD, (low_RD * cos_RD - high_RD * sin_RD).to(dtype), mask=inside)
    tl.store(out_RD + HALF, (high_RD * cos_RD + low_RD * sin_RD).to(dtype), mask=inside)


# fmt: off
@triton.jit
def rope_qkv_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, T, start,
    q_B, q_T, q_N, k_B, k_T, k_K, v_B, v_T, v_K, cos_B, cos_T, sin_B, sin_T,
    k_out_B, k_out_T, k_out_K, v_out_B, v_out_T, v_out_K,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T N / ROWS for the queries, then T K / ROWS for keys and values, B)."""
    wait_for_front(PDL)
    b, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    of_queries = tl.cdiv(T * N, ROWS)
    row_R1, d_1D = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    cos_ptr += b * cos_B
    sin_ptr += b * sin_B
    if program < of_queries:
        r_R1 = (program * ROWS + row_R1).to(tl.int64)
        inside = (r_R1 < T * N) & (d_1D < HALF)
        q_out_ptr += b * T * N * 2 * HALF
        _turn(
            q_ptr + b * q_B, q_T, q_N, cos_ptr, cos_T, sin_ptr, sin_T,
            q_out_ptr, N * 2 * HALF, 2 * HALF, 0, r_R1, d_1D, inside, N if N else 1, HALF,
        )
    else:
        r_R1 = ((program - of_queries) * ROWS + row_R1).to(tl.int64)
        inside = (r_R1 < T * K) & (d_1D < HALF)
        _turn(
            k_ptr + b * k_B, k_T, k_K, cos_ptr, cos_T, sin_ptr, sin_T,
            k_out_ptr + b * k_out_B, k_out_T, k_out_K, start, r_R1, d_1D, inside, K, HALF,
        )
        t_R1, k_R1 = r_R1 // K, r_R1 % K
        v_RD = v_ptr + b * v_B + t_R1 * v_T + k_R1 * v_K + d_1D
        v_out_RD = v_out_ptr + b * v_out_B + (start + t_R1) * v_out_T + k_R1 * v_out_K + d_1D
        low_RD = tl.load(v_RD, mask=inside, other=0.0)
        high_RD = tl.load(v_RD + HALF, mask=inside, other=0.0)
        tl.store(v_out_RD, low_RD, mask=inside)
        tl.store(v_out_RD + HALF, high_RD, mask=inside)
# fmt: on


def _launch(given: tuple[Tensor, ...], made: tuple[Tensor, ...], start: int) -> None:
    """given: q, k, v, cos, sin as the ops have them. made: where q, k, v go, the latter two from row `start` on."""
    q_BTNH, k_BTKH, v_BTKH, cos_BT1H, sin_BT1H = given
    _, k_out_BSKH, v_out_BSKH = made
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    require(H % 2 == 0, f"head dim {H} is odd; RoPE turns pairs")
    require(
        k_BTKH.shape == v_BTKH.shape == (B, T, K, H), f"keys {tuple(k_BTKH.shape)} or values do not fit the queries"
    )
    for turn in (cos_BT1H, sin_BT1H):
        require(turn.shape in ((B, T, 1, H), (1, T, 1, H)), f"{tuple(turn.shape)} turns no {tuple(q_BTNH.shape)}")
    S = k_out_BSKH.shape[1]
    require(k_out_BSKH.shape == v_out_BSKH.shape == (B, S, K, H), "the rooms do not fit the keys")
    require(0 <= start <= S - T, f"rows {start} to {start + T} of a room of {S}")
    require(q_BTNH.dtype in FLOATS, f"{q_BTNH.dtype} is none of {FLOATS}")
    require(len({x.dtype for x in (q_BTNH, k_BTKH, v_BTKH, k_out_BSKH, v_out_BSKH)}) == 1, "dtypes differ")
    for x in (q_BTNH, k_BTKH, v_BTKH, cos_BT1H, sin_BT1H, k_out_BSKH, v_out_BSKH):
        require(x.stride(-1) == 1, "values of a head must be adjacent")
    shape = LAUNCH["many" if B * T * N >= MANY_HEADS else "few"]
    programs = triton.cdiv(T * N, shape["ROWS"]) + triton.cdiv(T * K, shape["ROWS"])
    strides = [x.stride()[:3] for x in (q_BTNH, k_BTKH, v_BTKH)]
    strides += [(0 if x.shape[0] == 1 else x.stride(0), x.stride(1)) for x in (cos_BT1H, sin_BT1H)]
    strides += [x.stride()[:3] for x in (k_out_BSKH, v_out_BSKH)]
    launchable(rope_qkv_kernel)[(programs, B)](
        *given,
        *made,
        T,
        start,
        *(stride for of_one in strides for stride in of_one),
        N=N,
        K=K,
        HALF=H // 2,
        BLOCK=triton.next_power_of_2(H // 2),
        **shape,
        **launch_behind(dependent(q_BTNH)),
    )


@torch.library.triton_op("pi0exp::rope_qkv", mutates_args={})
def rope_qkv(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and the values, each contiguous.

    q, k, v: one dtype, bfloat16, float16 or float32; values of a head adjacent, all other strides free. cos, sin:
    [B or 1, T, 1, H], any dtype, both halves of H alike. There may be no queries: N = 0. Raises ValueError where they
    do not fit.
    """
    q_out, k_out, v_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTNH, k_BTKH, v_BTKH))
    _launch((q_BTNH, k_BTKH, v_BTKH, cos_BT1H, sin_BT1H), (q_out, k_out, v_out), 0)
    return q_out, k_out, v_out


@torch.library.triton_op("pi0exp::rope_qkv_cached", mutates_args={"room_k_BSKH", "room_v_BSKH"})
def rope_qkv_cached(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    cos_BT1H: Tensor,
    sin_BT1H: Tensor,
    room_k_BSKH: Tensor,
    room_v_BSKH: Tensor,
    start: int,
) -> Tensor:
    """As `rope_qkv`, but keys and values are written to rows start to start + T of the rooms; returns the queries.

    Raises ValueError where those rows are not all in the rooms, too.
    """
    q_out = torch.empty(q_BTNH.shape, dtype=q_BTNH.dtype, device=q_BTNH.device)
    _launch((q_BTNH, k_BTKH, v_BTKH, cos_BT1H, sin_BT1H), (q_out, room_k_BSKH, room_v_BSKH), start)
    return q_out


def _arguments(
    generator: torch.Generator,
    device: torch.device,
    shape: tuple[int, int, int, int, int],
    room: tuple[int, int] | None,
    turns: int,
    dtype: torch.dtype,
    turn_dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Views of one projection. `shape`: B, T, N, K, H; `room`: its rows and `start`; `turns`: batch of cos and sin."""
    B, T, N, K, H = shape
    heads = random(generator, device, B, T, N + 2 * K, H, dtype=dtype)
    angle = math.pi * random(generator, device, turns, T, 1, H // 2, dtype=torch.float32)
    cos, sin = (torch.cat([x, x], dim=-1).to(turn_dtype) for x in (angle.cos(), angle.sin()))
    given = (*heads.split([N, K, K], dim=2), cos, sin)
    if room is None:
        return given
    S, start = room
    return *given, *(random(generator, device, B, S, K, H, dtype=dtype) for _ in range(2)), start


def _case(
    name: str,
    B: int,
    T: int,
    N: int,
    K: int,
    H: int,
    *,
    room: tuple[int, int] | None,
    turns: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    turn_dtype: torch.dtype = torch.bfloat16,
    pi0: bool = False,
    small: bool = False,
) -> Case:
    # The least work reads one half of the cosines and sines.
    moved = 2 * B * T * (N + 2 * K) * H * dtype.itemsize + turns * T * H * turn_dtype.itemsize
    make = partial(_arguments, shape=(B, T, N, K, H), room=room, turns=turns, dtype=dtype, turn_dtype=turn_dtype)
    return Case(name, make, bytes_moved=moved, pi0=pi0, small=small, mutates=() if room is None else (5, 6))


def _tiny(cached: bool) -> tuple[Case, ...]:
    """Heads of 16; an odd number of tokens and heads; half a head that is no power of two."""
    f32, rooms = torch.float32, ((7, 2), (5, 0), (6, 1)) if cached else (None, None, None)
    return (
        _case("1 x 5, 4 heads on 1", 1, 5, 4, 1, 16, room=rooms[0], small=True),
        _case(
            "2 x 5, 3 heads on 3 float32", 2, 5, 3, 3, 20, room=rooms[1], turns=2, dtype=f32, turn_dtype=f32, small=True
        ),
        _case("2 x 3, 2 heads on 1, float32 turns", 2, 3, 2, 1, 36, room=rooms[2], turn_dtype=f32, small=True),
        _case("2 x 3, no queries", 2, 3, 0, 2, 16, room=rooms[2], small=True),
    )


def _ahead(name: str, launch: str) -> AheadOfTime:
    names = rope_qkv_kernel.arg_names
    constants = {"N": 8, "K": 1, "HALF": 128, "BLOCK": 128, "ROWS": LAUNCH[launch]["ROWS"]}
    types = {name: "*bf16:16" if name.endswith("_ptr") else "i32:16" for name in names if name not in constants}
    types |= {"T": "i32", "start": "i32"}
    return AheadOfTime(name, rope_qkv_kernel, types, constants, num_warps=LAUNCH[launch]["num_warps"])


KERNELS = (
    Kernel(
        "rope_qkv",
        rope_qkv,
        rope_qkv_reference,
        (
            _case("prefill 788", 1, 788, 8, 1, 256, room=None, pi0=True),
            _case("above L2 64 x 788", 64, 788, 8, 1, 256, room=None, turns=64, pi0=True),
            *_tiny(cached=False),
            _case(
                "3 x 1001, 5 heads on 5 of 72, float32 turns", 3, 1001, 5, 5, 72, room=None, turn_dtype=torch.float32
            ),
        ),
        also_dependent(_ahead("prefill", "many")),
    ),
    Kernel(
        "rope_qkv_cached",
        rope_qkv_cached,
        rope_qkv_cached_reference,
        (
            _case("denoise 11 behind 788", 1, 11, 8, 1, 256, room=(799, 788), pi0=True),
            _case("denoise 50 behind 816", 1, 50, 8, 1, 256, room=(866, 816), pi0=True),
            _case("prefill 788 of 839", 1, 788, 8, 1, 256, room=(839, 0), pi0=True),
            _case("last layer of the prefill, no queries", 1, 788, 0, 1, 256, room=(839, 0), pi0=True),
            _case("above L2 64 x 788 of 839", 64, 788, 8, 1, 256, room=(839, 0), turns=64, pi0=True),
            *_tiny(cached=True),
            _case("3 x 1001, 5 heads on 5 of 72", 3, 1001, 5, 5, 72, room=(1010, 3)),
        ),
        also_dependent(_ahead("denoise", "few")),
    ),
)
