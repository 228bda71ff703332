"""All layers of a denoising step in one launch, whose weights flow through a ring in shared memory.

The maths, the phases and their meetings are those of `stream_layers`. There a program reads its weights into registers
between coming to a meeting and being let through, and waits behind it for what has not arrived: 10 of the 28 us of a
layer. Here each program has the chunks of its weights, 32 KB each, in one row in memory, in the order in which it takes
them, and the GPU's copy engine brings them into a ring of SLOTS chunks. What was multiplied makes room for what comes
SLOTS chunks later, up to two thirds of a layer ahead, across all meetings.

Chunks are asked for a few behind each phase, whether it took any or not (`ring.ASK_QKV` and the others): all that a
phase took asked for at once stands in the way of what the next phases read, and makes the kernel slower than
`stream_layers` by 4 %; spread, it is faster by 9 % (experiments/speed.md).

One program a tile: D / COLUMNS = F / HIDDEN_COLUMNS programs, all at once. For one observation, at most ROWS rows, in
bf16, on NVIDIA GPUs from Hopper on. It is written in Gluon, for which Triton has no interpreter: off such a GPU its
compilation is tested, and its values by a small one of the tests' own, which knows neither layouts nor waiting.

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
from pi0exp.kernels.ring import (
    ASK_ATTENTION,
    ASK_DOWN,
    ASK_MIXING,
    ASK_OUT,
    ASK_QKV,
    CHUNK_ROWS,
    CHUNK_WIDTH,
    RING,
    ROWS,
    SLOTS,
    TILE_8,
    G,
    all_rows,
    ask,
    barrier,
    narrow_product,
)  # fmt: skip
from pi0exp.kernels.ring_pack import BK_D, BK_F, BK_OUT, BN, misfit, packed_ring, query_heads, unpacked_ring
from pi0exp.kernels.ring_phases import add, attend, hide, keys_of, mix, project, queries_of, values_of
from pi0exp.kernels.step import Sizes, launch_arguments
from pi0exp.kernels.stream_layers import UNROLLED, chunks_reference
from pi0exp.kernels.stream_layers_cases import PI0, SIZES, case, types_of
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, MIXED, PAIRS, Weights


@gluon.jit
def stream_ring_kernel(
    weights, tokens_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr, scales_ptr, gates_ptr, qkv_offsets_ptr,
    gate_up_offsets_ptr, cos_ptr, sin_ptr, rooms_ptr, keys_ptr, q_ptr, acc_ptr, stats_ptr, mixed_ptr, hidden_ptr,
    slots_ptr, clocks_ptr,
    M, start, settled, parts, L, scale, eps, scales_N, gates_N, qkv_offsets_L, gate_up_offsets_L, cos_T, sin_T,
    rooms_L, rooms_S,
    D: gl.constexpr, HEADS: gl.constexpr, HEADS_KV: gl.constexpr, H: gl.constexpr, F: gl.constexpr,
    BK_D: gl.constexpr, BK_OUT: gl.constexpr, BK_F: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr,
    MASKED: gl.constexpr, BLIND: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """Grid (D / COLUMNS,), all at once. A program has the tiles of its number, and such items of attention."""
    TILES: gl.constexpr = D // COLUMNS
    K: gl.constexpr = HEADS * H
    QKV_TILES: gl.constexpr = (HEADS + 2 * HEADS_KV) * H // (2 * PAIRS)
    QKV: gl.constexpr = D // (G * BK_D)
    OUT: gl.constexpr = K // (G * BK_OUT)
    GATE_UP: gl.constexpr = 2 * D // (G * BK_D)
    DOWN: gl.constexpr = F // (G * BK_F)
    CHUNKS: gl.constexpr = QKV + OUT + GATE_UP + DOWN
    me = gl.program_id(0)
    S = start + M
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, CHUNK_ROWS, CHUNK_WIDTH], RING)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
    barrier()
    total = gl.where(me < QKV_TILES, CHUNKS, CHUNKS - QKV) * L
    base = me * CHUNKS * L
    taken = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    own = gl.where(me < QKV_TILES, QKV, 0)
    asked = own + ASK_DOWN
    ask(weights, ring, ready, 0, gl.minimum(total, asked), base, QKV + ASK_DOWN)
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE_8)
    add(nothing, me, None, tokens_ptr, scales_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr, M, 0, D, BK_D)
    come(slots_ptr, slot, clocks_ptr, False)
    for layer in range(L):
        # Queries, keys, values.
        room_k = rooms_ptr + gl.cast(layer, gl.int64) * rooms_L
        room_v = room_k + HEADS_KV * H
        offsets = qkv_offsets_ptr
        if offsets is not None:
            offsets += layer * qkv_offsets_L
        meet(slots_ptr, slot, clocks_ptr, False)
        if me < QKV_TILES:
            xq = all_rows(xs_ptr, M, D, BK_D)
            project(
                xq, ring, ready, taken, me, squares_ptr, offsets, cos_ptr, sin_ptr, q_ptr, room_k, room_v, M, start,
                eps, cos_T, sin_T, rooms_S, rooms_S, D, HEADS, HEADS_KV, H, BK_D, TILES,
            )  # fmt: skip
            taken += QKV

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)

        # Attention: rows of a head against blocks of keys. What stood in the cache before is read before the meeting.
        item = me
        head_kv, first = (item // parts) // (HEADS // HEADS_KV), (item % parts) * BN
        k = keys_of(room_k, first, 0, settled, rooms_S, head_kv, H, BN)
        v = values_of(room_v, first, 0, settled, rooms_S, head_kv, H, BN)
        ask(weights, ring, ready, asked, total, base, ASK_QKV)
        asked += ASK_QKV
        meet(slots_ptr, slot, clocks_ptr, False)
        q = queries_of(q_ptr, item // parts, M, HEADS, H)
        if (item < HEADS * parts) & (first + BN > settled):
            k += keys_of(room_k, first, settled, S, rooms_S, head_kv, H, BN)
            v += values_of(room_v, first, settled, S, rooms_S, head_kv, H, BN)
        while item < HEADS * parts:
            attend(q, k, v, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale, HEADS, H, BN, MASKED, BLIND, HIDDEN)
            item += gl.num_programs(0)
            if item < HEADS * parts:
                head_kv, first = (item // parts) // (HEADS // HEADS_KV), (item % parts) * BN
                q = queries_of(q_ptr, item // parts, M, HEADS, H)
                k = keys_of(room_k, first, 0, S, rooms_S, head_kv, H, BN)
                v = values_of(room_v, first, 0, S, rooms_S, head_kv, H, BN)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask(weights, ring, ready, asked, total, base, ASK_ATTENTION)
        asked += ASK_ATTENTION
        meet(slots_ptr, slot, clocks_ptr, False)
        for item in range(me, HEADS * (H // MIXED), gl.num_programs(0)):
            mix(acc_ptr, stats_ptr, mixed_ptr, item, parts, HEADS, H, PARTS, BK_OUT)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask(weights, ring, ready, asked, total, base, ASK_MIXING)
        asked += ASK_MIXING
        gates = gates_ptr
        if gates is not None:
            gates += 2 * layer * gates_N
        meet(slots_ptr, slot, clocks_ptr, False)
        xo = all_rows(mixed_ptr, M, K, BK_OUT)
        y = narrow_product(xo, ring, ready, taken, K, BK_OUT)
        add(
            y, me, gates, x_ptr, scales_ptr + (2 * layer + 1) * scales_N, x_ptr, xs_ptr, end_ptr, squares_ptr, M, 0, D,
            BK_D,
        )  # fmt: skip
        taken += OUT

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask(weights, ring, ready, asked, total, base, ASK_OUT)
        asked += ASK_OUT

        # The hidden layer.
        offsets = gate_up_offsets_ptr
        if offsets is not None:
            offsets += layer * gate_up_offsets_L
        meet(slots_ptr, slot, clocks_ptr, False)
        xh = all_rows(xs_ptr, M, D, BK_D)
        hide(
            xh, ring, ready, taken, me, squares_ptr, offsets, hidden_ptr, M, eps, D, F, BK_D, BK_F, TILES
        )  # fmt: skip
        taken += GATE_UP

        slot += 1
        come(slots_ptr, slot, clocks_ptr, False)
        ask(weights, ring, ready, asked, gl.minimum(total, asked + own), base, QKV)
        asked += own
        gates = gates_ptr
        if gates is not None:
            gates += (2 * layer + 1) * gates_N
        meet(slots_ptr, slot, clocks_ptr, False)
        xd = all_rows(hidden_ptr, M, F, BK_F)
        y = narrow_product(xd, ring, ready, taken, F, BK_F)
        add(
            y, me, gates, x_ptr, scales_ptr + (2 * layer + 2) * scales_N, x_ptr, xs_ptr, end_ptr, squares_ptr, M,
            gl.where(layer == L - 1, M, 0), D, BK_D,
        )  # fmt: skip
        taken += DOWN
        slot += 1
        if layer < L - 1:
            come(slots_ptr, slot, clocks_ptr, False)
        ask(weights, ring, ready, asked, total, base, ASK_DOWN)
        asked += ASK_DOWN
    leave(slots_ptr, slot - 1, False)


@torch.library.custom_op("pi0exp::stream_ring", mutates_args=("rooms_LBSMH", "slots", "clocks"))
def stream_ring(
    tokens_BTD: Tensor, weights_PLCV: Tensor, scales_ND: Tensor, gates_ND: Tensor | None,
    qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor, sin_BT1H: Tensor,
    rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int, eps: float,
    slots: Tensor, clocks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the final norm needs, as `stream_layers`: xs [1, T, D], and its squares, float32 [D / COLUMNS, T].

    weights: of `packed_ring`, bf16. All other arguments as in `stream_layers`. Raises ValueError.
    """
    D, (P, L, chunks, values) = tokens_BTD.shape[2], weights_PLCV.shape
    heads, H = rooms_LBSMH.shape[3:]
    K, F, N = heads // 2, HIDDEN_COLUMNS.value * P, query_heads(D, P, chunks, H)
    require(N > 0 and N % K == 0, f"{N} heads of {H} on {K}")
    require(not (why := misfit(D, H, F, N, N + heads)), why)
    fits = values == CHUNK_ROWS.value * CHUNK_WIDTH.value and weights_PLCV.is_contiguous()
    require(fits and weights_PLCV.dtype is torch.bfloat16 and D // COLUMNS.value == P, "weights are not of packed_ring")
    given = launch_arguments(
        Sizes(L, N, H, F, torch.bfloat16), P, BN, tokens_BTD, scales_ND, gates_ND, qkv_offsets_LC, gate_up_offsets_LC,
        cos_BT1H, sin_BT1H, rooms_LBSMH, start, keys_BS, blind, scale, settled, eps, slots, clocks,
    )  # fmt: skip
    block = [CHUNK_ROWS.value, CHUNK_WIDTH.value]
    chunks_of_all = TensorDescriptor.from_tensor(weights_PLCV.view(-1, CHUNK_WIDTH.value), block, RING.value)
    stream_ring_kernel[(P,)](
        weights=chunks_of_all, **given, BK_D=BK_D, BK_OUT=BK_OUT, BK_F=BK_F, BN=BN, num_warps=G.value,
        launch_cooperative_grid=True,
    )  # fmt: skip
    return given["end_ptr"], given["squares_ptr"]


@stream_ring.register_fake
def _(tokens_BTD: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _, T, D = tokens_BTD.shape
    end = tokens_BTD.new_empty((1, T, D), dtype=torch.bfloat16)
    return end, tokens_BTD.new_empty((D // COLUMNS.value, T), dtype=torch.float32)


def _ahead(name: str, clocks: bool = False, **constants: Any) -> AheadOfTime:
    fixed = SIZES | {"BK_D": BK_D, "BK_OUT": BK_OUT, "BK_F": BK_F, "BN": BN} | constants
    if clocks:
        del fixed["clocks_ptr"]
    types = types_of(stream_ring_kernel) | {
        "weights": f"tensordesc<bf16[{CHUNK_ROWS.value}, {CHUNK_WIDTH.value}],{RING.value!r}>"
    }
    types = {argument: kind for argument, kind in types.items() if argument not in fixed}
    return AheadOfTime(name, stream_ring_kernel, types, fixed, G.value, dots=True, targets=("sm_90",))


def _packed(weights: Weights, H: int) -> tuple[Tensor]:
    return (packed_ring(weights, H),)


KERNELS = (
    Kernel(
        "stream_ring",
        stream_ring,
        chunks_reference(unpacked_ring),
        cases=(
            case("a step of 11 rows", 18, 11, PI0, start=788, settled=788, pi0=True, packed=_packed),
            case(
                "a step of 10 rows, adaptive", 18, 10, PI0, start=789, settled=788, adaptive=True, pi0=True,
                packed=_packed,
            ),
            case(
                "one layer, 16 rows, prompt of 200, hidden keys", 1, 16, PI0, start=968, settled=968, hidden=True,
                packed=_packed,
            ),
            case("three layers, a short cache", 3, 5, PI0, start=20, settled=0, packed=_packed),
        ),
        ahead_of_time=(
            _ahead("11 rows", gates_ptr=None, qkv_offsets_ptr=None, gate_up_offsets_ptr=None),
            _ahead("adaptive, hidden keys", MASKED=True, BLIND=False),
            _ahead("with clocks", clocks=True),
        ),
        interpretable=False,
        not_compiled=UNROLLED,
    ),
)  # fmt: skip
