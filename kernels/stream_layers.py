"""All layers of a denoising step in one launch: a persistent kernel, whose programs meet after each phase of a layer.

    z      = (xs w_qkv^T) / rms + offset       queries, keys, values; q and k rotated, k and v into the cache
    parts  = softmax(scale q k^T) v            of each head and block of keys
    mixed  = the parts of a head, weighed
    x      = x + gate (mixed w_out^T)          xs = x (1 + scale), and sums of squares for the norm to come
    hidden = gelu_tanh(z[:F]) z[F:]            z = (xs w_gate_up^T) / rms + offset
    x      = x + gate (hidden w_down^T)        likewise

These are the five launches of a layer that `stream` describes, with the combination of attention's parts as a phase of
its own. Where a launch takes 2 us to begin, a meeting takes about one, and what a phase reads of its weights is under
way before it (`stream_phases.held`). A program has the whole of K of its columns, so no sum is split between programs:
equal inputs give equal bits.

For one observation, at most ROWS rows, on NVIDIA GPUs that launch cooperatively; all programs must run at once.

Shapes: T rows, D width, L layers, C = (N + 2 K) H rows of w_qkv, N query heads, K key/value heads, H head dim, F hidden
width, S rows of the cache.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.attention import attend_reference
from pi0exp.kernels.gemm_epilogue import DTYPES
from pi0exp.kernels.kernel import INTERPRETED, Kernel, launchable, require
from pi0exp.kernels.meetings import come, leave, meet
from pi0exp.kernels.step import Sizes, launch_arguments
from pi0exp.kernels.stream import inverse_rms
from pi0exp.kernels.stream_ends import stream_begin_reference
from pi0exp.kernels.stream_gated import stream_gated_reference
from pi0exp.kernels.stream_layers_cases import CASES, ahead
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, LAUNCH, MIXED, PAIRS, ROWS, Weights, unfit, unpack
from pi0exp.kernels.stream_phases import add, attend, block_of, gate, held, mix, project, times
from pi0exp.kernels.stream_qkv import stream_qkv_reference
from pi0exp.kernels.stream_residual import squares_reference, stream_residual_reference

UNROLLED = "18 layers unrolled: minutes of compilation for each case"


def stream_layers_reference(
    tokens_BTD: Tensor, qkv_LCD: Tensor, out_LDK: Tensor, gate_up_LCD: Tensor, down_LDF: Tensor, scales_ND: Tensor,
    gates_ND: Tensor | None, qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor,
    sin_BT1H: Tensor, rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int,
    eps: float, slots: Tensor, clocks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The maths above, by the references of the launches."""
    weights = unpack(Weights(qkv_LCD, out_LDK, gate_up_LCD, down_LDF), rooms_LBSMH.shape[4])
    return layers_reference(
        tokens_BTD, weights, scales_ND, gates_ND, qkv_offsets_LC, gate_up_offsets_LC, cos_BT1H, sin_BT1H, rooms_LBSMH,
        start, keys_BS, blind, scale, settled, eps, slots,
    )  # fmt: skip


def chunks_reference(unpacked: Callable[[Tensor, int, int, int], Weights]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The maths of `stream_layers` for an op whose weights are chunks of one tensor, by the references of its launches.

    unpacked: chunks, D, head dim, heads of keys and values together -> the weights.
    """

    def reference(
        tokens_BTD: Tensor, weights_PLCV: Tensor, scales_ND: Tensor, gates_ND: Tensor | None,
        qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor, sin_BT1H: Tensor,
        rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int, eps: float,
        slots: Tensor, clocks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        heads, H = rooms_LBSMH.shape[3:]
        weights = unpacked(weights_PLCV, tokens_BTD.shape[2], H, heads)
        return layers_reference(
            tokens_BTD, weights, scales_ND, gates_ND, qkv_offsets_LC, gate_up_offsets_LC, cos_BT1H, sin_BT1H,
            rooms_LBSMH, start, keys_BS, blind, scale, settled, eps, slots,
        )  # fmt: skip

    return reference


def layers_reference(
    tokens_BTD: Tensor, weights: Weights, scales_ND: Tensor, gates_ND: Tensor | None, qkv_offsets_LC: Tensor | None,
    gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor, sin_BT1H: Tensor, rooms_LBSMH: Tensor, start: int,
    keys_BS: Tensor | None, blind: bool, scale: float, settled: int, eps: float, slots: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with weights as they are."""
    T, K = tokens_BTD.shape[1], rooms_LBSMH.shape[3] // 2
    x, xs, squares = stream_begin_reference(tokens_BTD, scales_ND[0], weights.qkv_LCD)

    def of(table: Tensor | None, row: int) -> Tensor | None:
        return None if table is None else table[row]

    for layer, room in enumerate(rooms_LBSMH):
        room_k, room_v = room[:, :, :K], room[:, :, K:]
        q = stream_qkv_reference(
            xs, squares, weights.qkv_LCD[layer], of(qkv_offsets_LC, layer), cos_BT1H, sin_BT1H, room_k, room_v, start,
            eps, slots,
        )  # fmt: skip
        mixed = attend_reference(q, room_k[:, : start + T], room_v[:, : start + T], keys_BS, blind, scale)
        x, xs, _ = stream_residual_reference(
            mixed.flatten(2), weights.out_LDK[layer], x, of(gates_ND, 2 * layer), scales_ND[2 * layer + 1], slots
        )
        hidden = stream_gated_reference(
            xs, squares_reference(x, COLUMNS.value), weights.gate_up_LCD[layer], of(gate_up_offsets_LC, layer), eps,
            slots,
        )  # fmt: skip
        x, xs, _ = stream_residual_reference(
            hidden, weights.down_LDF[layer], x, of(gates_ND, 2 * layer + 1), scales_ND[2 * layer + 2], slots
        )
        squares = squares_reference(x, COLUMNS.value)
    return xs, squares


@triton.jit
def stream_layers_kernel(
    tokens_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr, qkv_ptr, out_ptr, gate_up_ptr, down_ptr,
    scales_ptr, gates_ptr, qkv_offsets_ptr, gate_up_offsets_ptr, cos_ptr, sin_ptr, rooms_ptr, keys_ptr,
    q_ptr, acc_ptr, stats_ptr, mixed_ptr, hidden_ptr, slots_ptr, clocks_ptr,
    M, start, settled, parts, L, scale, eps, scales_N, gates_N, qkv_offsets_L, gate_up_offsets_L, cos_T, sin_T,
    rooms_L, rooms_S,
    D: tl.constexpr, HEADS: tl.constexpr, HEADS_KV: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    G: tl.constexpr, BK_D: tl.constexpr, BK_OUT: tl.constexpr, BK_F: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr, PROGRAMS: tl.constexpr, MASKED: tl.constexpr, BLIND: tl.constexpr,
    HIDDEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS,), all at once. A program takes the tiles, blocks and heads of its number, and every PROGRAMS-th
    from there; the tile that it reads where there are no more is not used."""
    ALONE: tl.constexpr = PROGRAMS == 1
    K: tl.constexpr = HEADS * H
    QKV_TILES: tl.constexpr = (HEADS + 2 * HEADS_KV) * H // (2 * PAIRS)
    HIDDEN_TILES: tl.constexpr = F // HIDDEN_COLUMNS
    TILES: tl.constexpr = D // COLUMNS
    QKV_TURNS: tl.constexpr = (QKV_TILES + PROGRAMS - 1) // PROGRAMS
    HIDDEN_TURNS: tl.constexpr = (HIDDEN_TILES + PROGRAMS - 1) // PROGRAMS
    TURNS: tl.constexpr = (TILES + PROGRAMS - 1) // PROGRAMS
    STEPS: tl.constexpr = D // (G * BK_D)
    me = tl.program_id(0)
    m_M = tl.arange(0, ROWS)
    S = start + M
    slot = 0
    for turn in tl.static_range(TURNS):
        if me + turn * PROGRAMS < TILES:
            nothing = tl.zeros((ROWS, COLUMNS), tl.float32)
            add(
                nothing, me + turn * PROGRAMS, None, tokens_ptr, scales_ptr, x_ptr, xs_ptr, end_ptr, squares_ptr,
                M, 0, D, G, BK_D,
            )  # fmt: skip
    come(slots_ptr, slot, clocks_ptr, ALONE)
    for layer in range(L):
        # Queries, keys, values.
        weight = qkv_ptr + tl.cast(layer, tl.int64) * (QKV_TILES * 2 * PAIRS * D)
        tiles = held((), weight, me, QKV_TILES, PROGRAMS, 2 * PAIRS, D, G, BK_D, 0, STEPS)
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        by_row = inverse_rms(squares_ptr, m_M, M, D, eps, TILES, TILES)
        room_k = rooms_ptr + tl.cast(layer, tl.int64) * rooms_L
        room_v = room_k + HEADS_KV * H
        offsets = qkv_offsets_ptr
        if offsets is not None:
            offsets += layer * qkv_offsets_L
        for turn in tl.static_range(QKV_TURNS):
            if me + turn * PROGRAMS < QKV_TILES:
                z = times(xs_ptr, M, tiles, turn, QKV_TURNS, D, 2 * PAIRS, G, BK_D, UPCAST)
                project(
                    z, me + turn * PROGRAMS, by_row, offsets, cos_ptr, sin_ptr, q_ptr, room_k, room_v, M, start,
                    cos_T, sin_T, rooms_S, rooms_S, HEADS, HEADS_KV, H,
                )  # fmt: skip

        slot += 1
        come(slots_ptr, slot, clocks_ptr, ALONE)

        # Attention: rows of a head against blocks of keys. What stood in the cache before is read before the meeting.
        item = me
        head_kv, first = (item // parts) // (HEADS // HEADS_KV), (item % parts) * BN
        k = block_of(room_k, first, 0, settled, rooms_S, head_kv, H, BN)
        v = block_of(room_v, first, 0, settled, rooms_S, head_kv, H, BN)
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        if (item < HEADS * parts) & (first + BN > settled):
            k += block_of(room_k, first, settled, S, rooms_S, head_kv, H, BN)
            v += block_of(room_v, first, settled, S, rooms_S, head_kv, H, BN)
        while item < HEADS * parts:
            attend(
                q_ptr, k, v, keys_ptr, acc_ptr, stats_ptr, item, parts, M, S, scale,
                HEADS, H, BN, MASKED, BLIND, HIDDEN, UPCAST,
            )  # fmt: skip
            item += PROGRAMS
            if item < HEADS * parts:
                head_kv, first = (item // parts) // (HEADS // HEADS_KV), (item % parts) * BN
                k = block_of(room_k, first, 0, S, rooms_S, head_kv, H, BN)
                v = block_of(room_v, first, 0, S, rooms_S, head_kv, H, BN)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, ALONE)
        weight = out_ptr + tl.cast(layer, tl.int64) * (D * K)
        tiles = held((), weight, me, TILES, PROGRAMS, COLUMNS, K, G, BK_OUT, 0, K // (G * BK_OUT))
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        for item in range(me, HEADS * (H // MIXED), PROGRAMS):
            mix(acc_ptr, stats_ptr, mixed_ptr, tl.cast(item, tl.int32), parts, HEADS, H, PARTS, G, BK_OUT)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, ALONE)
        # The widest weight: some of it a meeting before the rest.
        weight = gate_up_ptr + tl.cast(layer, tl.int64) * (2 * F * D)
        hidden = held((), weight, me, HIDDEN_TILES, PROGRAMS, 2 * HIDDEN_COLUMNS, D, G, BK_D, 0, EARLY)
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        gates = gates_ptr
        if gates is not None:
            gates += 2 * layer * gates_N
        for turn in tl.static_range(TURNS):
            if me + turn * PROGRAMS < TILES:
                y = times(mixed_ptr, M, tiles, turn, TURNS, K, COLUMNS, G, BK_OUT, UPCAST)
                add(
                    y, me + turn * PROGRAMS, gates, x_ptr, scales_ptr + (2 * layer + 1) * scales_N, x_ptr, xs_ptr,
                    end_ptr, squares_ptr, M, 0, D, G, BK_D,
                )  # fmt: skip

        slot += 1
        come(slots_ptr, slot, clocks_ptr, ALONE)

        # The hidden layer.
        hidden = held(hidden, weight, me, HIDDEN_TILES, PROGRAMS, 2 * HIDDEN_COLUMNS, D, G, BK_D, EARLY, STEPS)
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        by_row = inverse_rms(squares_ptr, m_M, M, D, eps, TILES, TILES)
        offsets = gate_up_offsets_ptr
        if offsets is not None:
            offsets += layer * gate_up_offsets_L
        for turn in tl.static_range(HIDDEN_TURNS):
            if me + turn * PROGRAMS < HIDDEN_TILES:
                z = times(xs_ptr, M, hidden, turn, HIDDEN_TURNS, D, 2 * HIDDEN_COLUMNS, G, BK_D, UPCAST)
                gate(z, me + turn * PROGRAMS, by_row, offsets, hidden_ptr, F, G, BK_F)

        slot += 1
        come(slots_ptr, slot, clocks_ptr, ALONE)
        weight = down_ptr + tl.cast(layer, tl.int64) * (D * F)
        tiles = held((), weight, me, TILES, PROGRAMS, COLUMNS, F, G, BK_F, 0, F // (G * BK_F))
        meet(slots_ptr, slot, clocks_ptr, ALONE)
        gates = gates_ptr
        if gates is not None:
            gates += (2 * layer + 1) * gates_N
        for turn in tl.static_range(TURNS):
            if me + turn * PROGRAMS < TILES:
                y = times(hidden_ptr, M, tiles, turn, TURNS, F, COLUMNS, G, BK_F, UPCAST)
                add(
                    y, me + turn * PROGRAMS, gates, x_ptr, scales_ptr + (2 * layer + 2) * scales_N, x_ptr, xs_ptr,
                    end_ptr, squares_ptr, M, tl.where(layer == L - 1, M, 0), D, G, BK_D,
                )  # fmt: skip
        slot += 1
        if layer < L - 1:
            come(slots_ptr, slot, clocks_ptr, ALONE)
    leave(slots_ptr, slot - 1, ALONE)


@triton_op("pi0exp::stream_layers", mutates_args=("rooms_LBSMH", "slots", "clocks"))
def stream_layers(
    tokens_BTD: Tensor, qkv_LCD: Tensor, out_LDK: Tensor, gate_up_LCD: Tensor, down_LDF: Tensor, scales_ND: Tensor,
    gates_ND: Tensor | None, qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor,
    sin_BT1H: Tensor, rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int,
    eps: float, slots: Tensor, clocks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the final norm needs: xs behind the last layer, [1, T, D], and its squares, float32 [D / COLUMNS, T].

    tokens: [1, T, D], any floating dtype, contiguous. qkv: [L, (N + 2 K) H, D]; out: [L, D, N H]; gate_up: [L, 2 F, D];
    down: [L, D, F], all of `pack`, of one dtype. scales: [2 L + 1, D], what one is added to behind each norm; gates:
    [2 L, D] or None; offsets: float32 [L, C], [L, 2 F] or None; rows may be apart. cos, sin: [1, T, 1, H]. rooms:
    [L, 1, R, 2 K, H], keys, then values; rows `start` to `start + T` are written. keys: bool [1, start + T], which may
    be seen, or None for all; blind: the first row sees none of the rows behind it. settled: so many rows of the cache
    were complete before. slots: int32 [COUNTERS], zeros, left as zeros, not shared between streams. At most ROWS rows.
    clocks: None, or int64 [2 PHASES L, programs], for each program's clock at each meeting. Raises ValueError.
    """
    D, (L, C, _), F = tokens_BTD.shape[2], qkv_LCD.shape, down_LDF.shape[2]
    heads, H = rooms_LBSMH.shape[3:]
    K, N, dtype = heads // 2, C // H - heads, qkv_LCD.dtype
    require(not (why := unfit(D, H, F, N)), why)
    require(H // 2 % PAIRS.value == 0 and N % K == 0, f"{N} heads of {H} on {K}")
    shapes = [(qkv_LCD, (L, C, D)), (out_LDK, (L, D, N * H)), (gate_up_LCD, (L, 2 * F, D)), (down_LDF, (L, D, F))]
    for tensor, shape in shapes:
        fits = tensor.shape == shape and tensor.is_contiguous() and tensor.dtype is dtype
        require(fits, f"{tensor.dtype} {list(tensor.shape)} is not {dtype} {list(shape)}, contiguous")
    require(dtype in DTYPES, f"weights are {dtype}: wanted bfloat16, float16 or float32")
    constants = LAUNCH.constants(D, N, H, F)
    cpu = tokens_BTD.device.type == "cpu"  # interpreted, or traced
    programs = 1 if cpu else torch.cuda.get_device_properties(tokens_BTD.device).multi_processor_count
    given = launch_arguments(
        Sizes(L, N, H, F, dtype), programs, constants["BN"], tokens_BTD, scales_ND, gates_ND, qkv_offsets_LC,
        gate_up_offsets_LC, cos_BT1H, sin_BT1H, rooms_LBSMH, start, keys_BS, blind, scale, settled, eps, slots, clocks,
    )  # fmt: skip
    launchable(stream_layers_kernel)[(programs,)](
        **given, qkv_ptr=qkv_LCD, out_ptr=out_LDK, gate_up_ptr=gate_up_LCD, down_ptr=down_LDF, **constants,
        PROGRAMS=programs, UPCAST=INTERPRETED, num_warps=constants["G"], num_stages=1,
        **({} if INTERPRETED else {"launch_cooperative_grid": True}),
    )  # fmt: skip
    return given["end_ptr"], given["squares_ptr"]


KERNELS = (
    Kernel(
        "stream_layers",
        stream_layers,
        stream_layers_reference,
        cases=CASES,
        not_compiled=UNROLLED,
        ahead_of_time=(
            ahead("11 rows", stream_layers_kernel, gates_ptr=None, qkv_offsets_ptr=None, gate_up_offsets_ptr=None),
            ahead("adaptive, hidden keys", stream_layers_kernel, MASKED=True, BLIND=False),
            ahead("with clocks", stream_layers_kernel, clocks=True),
        ),
    ),
)
