"""All layers of a denoising step of many rows in one launch, whose weights flow through a ring in shared memory.

The maths is that of `stream_layers`, for up to ROWS rows: a horizon of 50. There, and in `stream_ring`, each program
has the whole of K of a few columns and reads all of x for them. With 50 rows that is more than the weights: w_down's
programs alone would read 50 MB. Here a program has BOX columns and a part of K of w_out and w_down, reads that part of
x only, and leaves its sums to a phase that adds the parts in their order: eight phases a layer, where those have six.
Products are made by warp groups, straight from shared memory, to which the copy engine brings weights, ahead, and x.
What one phase stores and the next copies lies box by box (`wide.place`).

    qkv | attention, a head and a block of keys each | its parts mixed | w_out, parts | sum, residual, norm's squares
    | gate and up, activation | w_down, parts | sum, residual, norm's squares

One program for COLUMNS columns of the residual stream, all at once; for one observation, in bf16, on NVIDIA GPUs from
Hopper on. In Gluon, as `stream_ring`, and tested alike. Equal inputs give equal bits: all sums have one order.

Shapes: T rows, D width, L layers, C = (N + 2 K) H rows of w_qkv, N query heads, K key/value heads, H head dim, F hidden
width, S rows of the cache, P programs.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pi0exp.kernels.kernel import AheadOfTime, Kernel, require
from pi0exp.kernels.meetings import come, leave, meet
from pi0exp.kernels.ring import barrier
from pi0exp.kernels.step import Sizes, launch_arguments
from pi0exp.kernels.step_phases import inverse_rms
from pi0exp.kernels.stream_layers import UNROLLED, chunks_reference
from pi0exp.kernels.stream_layers_cases import PI0, SIZES, case, types_of
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS, Weights
from pi0exp.kernels.wide import (
    BOX,
    BOXES,
    ROWS,
    SHARED,
    SLOTS,
    SQUARES,
    SUMS_32,
    SUMS_64,
    WARPS,
    ask,
    ask_later,
    order_copies,
    product,
)  # fmt: skip
from pi0exp.kernels.wide_pack import PARTS, STEP, misfit, packed_wide, query_heads, unpacked_wide
from pi0exp.kernels.wide_phases import (
    QUERIES,
    add,
    attend,
    hide,
    keep,
    keep_block,
    leave_sums,
    mix,
    project,
)  # fmt: skip

PHASES = 8


@gluon.jit
def cross(slots_ptr, slot, clocks_ptr):
    """A meeting behind which the copy engine reads what others have stored."""
    order_copies(slot)
    come(slots_ptr, slot, clocks_ptr, False)
    meet(slots_ptr, slot, clocks_ptr, False)
    order_copies(slot)


@gluon.jit
def stream_wide_kernel(
    weights, xs, mixed, hidden, tokens_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr, sums_ptr, scales_ptr, gates_ptr,
    qkv_offsets_ptr, gate_up_offsets_ptr, cos_ptr, sin_ptr, rooms_ptr, keys_ptr, q_ptr, acc_ptr, stats_ptr, mixed_ptr,
    hidden_ptr, slots_ptr, clocks_ptr,
    M, start, settled, parts, L, scale, eps, scales_N, gates_N, qkv_offsets_L, gate_up_offsets_L, cos_T, sin_T,
    rooms_L, rooms_S,
    D: gl.constexpr, HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr, F: gl.constexpr,
    SPLIT: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, MASKED: gl.constexpr, BLIND: gl.constexpr,
    HIDDEN: gl.constexpr,
):  # fmt: skip
    """Grid (D / COLUMNS,), all at once. SPLIT: parts of K of w_out and w_down. WIDTH: of K that a chunk of x has."""
    TILES: gl.constexpr = D // COLUMNS
    K: gl.constexpr = HEADS * H
    QKV_TILES: gl.constexpr = (HEADS + 2 * HEADS_KV) * H // (2 * PAIRS)
    QKV: gl.constexpr = D // (2 * WIDTH)
    OUT: gl.constexpr = K // (SPLIT * WIDTH)
    GATE_UP: gl.constexpr = D // WIDTH
    DOWN: gl.constexpr = F // (SPLIT * WIDTH)
    me = gl.program_id(0)
    tile, part = me // SPLIT, me % SPLIT
    S = start + M
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BOXES * BOX, BOX], SHARED)
    rows = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BOXES * ROWS, BOX], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    there = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(there.index(i), count=1)
    barrier()
    of_layer = gl.where(me < QKV_TILES, QKV, 0) + OUT + GATE_UP + DOWN
    total = of_layer * L
    base = me * (QKV + OUT + GATE_UP + DOWN) * L
    taken = gl.to_tensor(0)
    seen = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    for i in gl.static_range(SLOTS):
        ask(weights, ring, ready, i, total, base)
    add(sums_ptr, me, None, tokens_ptr, scales_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr, M, 0, D, 0)
    for layer in range(L):
        # Queries, keys, values.
        room_k = rooms_ptr + gl.cast(layer, gl.int64) * rooms_L
        room_v = room_k + HEADS_KV * H
        offsets = qkv_offsets_ptr
        if offsets is not None:
            offsets += layer * qkv_offsets_L
        cross(slots_ptr, slot, clocks_ptr)
        if me < QKV_TILES:
            by_row = inverse_rms(squares_ptr, M, D, eps, TILES, ROWS, SQUARES)
            z = product(
                xs, rows, there, seen, 0, weights, ring, ready, taken, total, base, 2 * PAIRS, GATE_UP, SUMS_32
            )  # fmt: skip
            project(
                z, me, by_row, offsets, cos_ptr, sin_ptr, q_ptr, room_k, room_v, M, start, cos_T, sin_T, rooms_S,
                rooms_S, HEADS, HEADS_KV, H,
            )  # fmt: skip
            taken += QKV
            seen += GATE_UP

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        if me < QKV_TILES:
            ask_later(weights, ring, ready, taken, total, base, QKV)

        # Attention: rows of a head against blocks of keys. What stood in the cache before is read before the meeting.
        item = me
        if item < HEADS * parts:
            keep_block(rows, room_k, item, parts, settled, rooms_S, HEADS, HEADS_KV, H)
        meet(slots_ptr, slot, clocks_ptr, False)
        if (item < HEADS * parts) & ((item % parts) * ROWS + ROWS > settled):
            keep_block(rows, room_k, item, parts, S, rooms_S, HEADS, HEADS_KV, H)
        while item < HEADS * parts:
            keep(rows, QUERIES, q_ptr + (item // parts) * H, 0, M, K)
            attend(rows, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale, H, MASKED, BLIND, HIDDEN)
            item += gl.num_programs(0)
            if item < HEADS * parts:
                keep_block(rows, room_k, item, parts, S, rooms_S, HEADS, HEADS_KV, H)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        meet(slots_ptr, slot, clocks_ptr, False)
        for item in range(me, HEADS * (H // MIXED), gl.num_programs(0)):
            mix(acc_ptr, stats_ptr, mixed_ptr, item, parts, M, HEADS, H, PARTS)

        slot += 1
        cross(slots_ptr, slot, clocks_ptr)
        y = product(
            mixed, rows, there, seen, part * (K // SPLIT), weights, ring, ready, taken, total, base, BOX, OUT, SUMS_64
        )  # fmt: skip
        leave_sums(y, sums_ptr, tile, part, M, D)
        taken += OUT
        seen += OUT

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask_later(weights, ring, ready, taken, total, base, OUT)
        gates = gates_ptr
        if gates is not None:
            gates += 2 * layer * gates_N
        meet(slots_ptr, slot, clocks_ptr, False)
        add(
            sums_ptr, me, gates, x_ptr, scales_ptr + (2 * layer + 1) * scales_N, x_ptr, xs_ptr, end_ptr, squares_ptr,
            M, 0, D, SPLIT,
        )  # fmt: skip

        # The hidden layer.
        slot += 1
        offsets = gate_up_offsets_ptr
        if offsets is not None:
            offsets += layer * gate_up_offsets_L
        cross(slots_ptr, slot, clocks_ptr)
        by_row = inverse_rms(squares_ptr, M, D, eps, TILES, ROWS, SQUARES)
        z = product(xs, rows, there, seen, 0, weights, ring, ready, taken, total, base, BOX, GATE_UP, SUMS_64)
        hide(z, me, by_row, offsets, hidden_ptr, M, F)
        taken += GATE_UP
        seen += GATE_UP

        slot += 1
        order_copies(slot)
        come(slots_ptr, slot, clocks_ptr, False)
        ask_later(weights, ring, ready, taken, total, base, GATE_UP)
        meet(slots_ptr, slot, clocks_ptr, False)
        order_copies(slot)
        y = product(
            hidden, rows, there, seen, part * (F // SPLIT), weights, ring, ready, taken, total, base, BOX, DOWN, SUMS_64
        )  # fmt: skip
        leave_sums(y, sums_ptr, tile, part, M, D)
        taken += DOWN
        seen += DOWN

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask_later(weights, ring, ready, taken, total, base, DOWN)
        gates = gates_ptr
        if gates is not None:
            gates += (2 * layer + 1) * gates_N
        meet(slots_ptr, slot, clocks_ptr, False)
        add(
            sums_ptr, me, gates, x_ptr, scales_ptr + (2 * layer + 2) * scales_N, x_ptr, xs_ptr, end_ptr, squares_ptr,
            M, gl.where(layer == L - 1, M, 0), D, SPLIT,
        )  # fmt: skip
        slot += 1
    leave(slots_ptr, slot - 1, False)


@torch.library.custom_op("pi0exp::stream_wide", mutates_args=("rooms_LBSMH", "slots", "clocks"))
def stream_wide(
    tokens_BTD: Tensor, weights_PLCV: Tensor, scales_ND: Tensor, gates_ND: Tensor | None,
    qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor, sin_BT1H: Tensor,
    rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int, eps: float,
    slots: Tensor, clocks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the final norm needs, as `stream_layers`: xs [1, T, D], and its squares, float32 [D / COLUMNS, T].

    weights: of `packed_wide`, bf16. clocks: None, or int64 [2 PHASES L, programs]. All other arguments as in
    `stream_layers`, for at most ROWS rows. Raises ValueError.
    """
    D, (P, L, chunks, values) = tokens_BTD.shape[2], weights_PLCV.shape
    heads, H = rooms_LBSMH.shape[3:]
    K, F, N = heads // 2, HIDDEN_COLUMNS.value * P, query_heads(D, chunks, H)
    require(N > 0 and N % K == 0, f"{N} heads of {H} on {K}")
    require(not (why := misfit(D, H, F, N, N + heads)), why)
    fits = values == STEP * BOX.value and weights_PLCV.is_contiguous() and D // COLUMNS.value == P
    require(fits and weights_PLCV.dtype is torch.bfloat16, "weights are not of packed_wide")
    given = launch_arguments(
        Sizes(L, N, H, F, torch.bfloat16, ROWS.value, PHASES), P, ROWS.value, tokens_BTD, scales_ND, gates_ND,
        qkv_offsets_LC, gate_up_offsets_LC, cos_BT1H, sin_BT1H, rooms_LBSMH, start, keys_BS, blind, scale, settled, eps,
        slots, clocks,
    )  # fmt: skip
    sums = tokens_BTD.new_empty((PARTS, ROWS.value, D), dtype=torch.float32)
    copied = {"weights": weights_PLCV} | {name: given[f"{name}_ptr"] for name in ("xs", "mixed", "hidden")}
    copied = {name: one.view(-1, BOX.value) for name, one in copied.items()}
    block = [BOXES.value * BOX.value, BOX.value]
    described = {name: TensorDescriptor.from_tensor(one, block, SHARED.value) for name, one in copied.items()}
    stream_wide_kernel[(P,)](
        **described, **given, sums_ptr=sums, SPLIT=PARTS, WIDTH=STEP, num_warps=WARPS.value,
        launch_cooperative_grid=True,
    )  # fmt: skip
    return given["end_ptr"], given["squares_ptr"]


@stream_wide.register_fake
def _(tokens_BTD: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _, T, D = tokens_BTD.shape
    end = tokens_BTD.new_empty((1, T, D), dtype=torch.bfloat16)
    return end, tokens_BTD.new_empty((D // COLUMNS.value, T), dtype=torch.float32)


def _ahead(name: str, clocks: bool = False, **constants: Any) -> AheadOfTime:
    fixed = SIZES | {"SPLIT": PARTS, "WIDTH": STEP} | constants
    if clocks:
        del fixed["clocks_ptr"]
    described = f"tensordesc<bf16[{BOXES.value * BOX.value}, {BOX.value}],{SHARED.value!r}>"
    types = types_of(stream_wide_kernel) | dict.fromkeys(("weights", "xs", "mixed", "hidden"), described)
    types |= {"sums_ptr": "*fp32:16"}
    types = {argument: kind for argument, kind in types.items() if argument not in fixed}
    return AheadOfTime(name, stream_wide_kernel, types, fixed, WARPS.value, dots=True, targets=("sm_90",))


def _packed(weights: Weights, H: int) -> tuple[Tensor]:
    return (packed_wide(weights, H),)


KERNELS = (
    Kernel(
        "stream_wide",
        stream_wide,
        chunks_reference(unpacked_wide),
        cases=(
            case("a step of 51 rows", 18, 51, PI0, start=788, settled=788, pi0=True, packed=_packed),
            case(
                "a step of 50 rows, prompt of 200, adaptive",
                18,
                50,
                PI0,
                start=968,
                settled=968,
                adaptive=True,
                pi0=True,
                packed=_packed,
            ),
            case("one layer, 64 rows, hidden keys", 1, 64, PI0, start=900, settled=900, hidden=True, packed=_packed),
            case("three layers, a short cache", 3, 5, PI0, start=20, settled=0, packed=_packed),
        ),
        ahead_of_time=(
            _ahead("51 rows", gates_ptr=None, qkv_offsets_ptr=None, gate_up_offsets_ptr=None),
            _ahead("adaptive, hidden keys", MASKED=True, BLIND=False),
            _ahead("with clocks", clocks=True),
        ),
        interpretable=False,
        not_compiled=UNROLLED,
    ),
)
