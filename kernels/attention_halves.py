"""Attention of the prefill on Hopper, its keys in two halves, of which each has a warp group of its own.

The maths is that of `attention`. There a program has one warp group, which multiplies, waits, and takes the softmax
while its matrix unit rests: on an H200 the prefill's takes 21 us, three times what the products need. Here a second
group does the same for every second block of keys, so that one multiplies while the other takes its softmax; at the end
the first puts both results together, as `attend_split` does with those of its parts. More rows for two groups would be
the other way, but 128 a program make 50 programs, too few for 132 multiprocessors (experiments/speed.md).

One program for BLOCK_M rows, a token's query heads one after the other, which share one key/value head. Keys and values
come by the copy engine, a block of each ahead. For one observation, in bf16. In Gluon, as `stream_ring`, and tested
alike: off such a GPU its compilation, and its values by the small interpreter of the tests.

Shapes: B batch (1), T query tokens, S key tokens, N query heads, K key/value heads (1), H head dim; M rows of a
program, BN keys of a block.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pi0exp.kernels.attention import HIDDEN, attend_reference
from pi0exp.kernels.attention_cases import GEMMA, LIBRARIES, attention_case
from pi0exp.kernels.attention_launch import check_arguments
from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import AheadOfTime, Kernel, require
from pi0exp.kernels.ring import barrier, load_block

BLOCK_M, BLOCK_N = gl.constexpr(64), gl.constexpr(64)
HEAD_DIM = gl.constexpr(256)
GROUPS = gl.constexpr(2)
WARPS = gl.constexpr(4)
"""Of a group: four make a warp group, which a matrix instruction takes."""
REGISTERS = gl.constexpr(240)
"""A thread, of 65536 a multiprocessor: 128 of them hold its part of the sums."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
MIXED = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
PROBS = gl.constexpr(gl.DotOperandLayout(0, MIXED, 2))
HANDED = gl.constexpr(gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))
"""Sums on their way from one group to the other: rows that are stored together lie in different banks."""
BY_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def ask(rows, buffer, there, block, end):
    """Starts the copy of a block of keys or values to where nothing stands any more, if there is such a block."""
    mbarrier.expect(there, BLOCK_N * HEAD_DIM * 2, pred=block < end)
    load_block(rows, [block * BLOCK_N, 0], there, buffer, pred=block < end)


@gluon.jit
def attend_half(
    q, k, v, k_there, v_there, keys, values, seen_ptr, S, seen_S, scale, group,
    MASKED: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """The blocks of keys of one group: probabilities times values [M, H], and by row the largest score and the sum.

    Scores are in units of log 2. k, v: [BN, H], whose first blocks have been asked for.
    """
    blocks = (S + BLOCK_N - 1) // BLOCK_N
    to_log2 = gl.cast(scale, gl.float32) * 1.4426950408889634
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, layout=MIXED)
    largest = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=SCORES)
    for block in range(group, blocks, GROUPS):
        phase = (block // GROUPS) & 1
        mbarrier.wait(k_there, phase)
        scores = warpgroup_mma(q, k.permute([1, 0]), nothing, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        barrier()  # all warps of the group have read the keys
        ask(keys, k, k_there, block + GROUPS, blocks)

        key = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores *= to_log2
        if MASKED:
            seen = gl.load(seen_ptr + key * seen_S, mask=key < S, other=0).to(gl.int1)
            scores = gl.where(seen[None, :], scores, HIDDEN)
        scores = gl.where((key < S)[None, :], scores, float("-inf"))  # not HIDDEN: these are no keys at all
        larger = gl.maximum(largest, gl.max(scores, 1))
        shrink = gl.exp2(largest - larger)
        probs = gl.exp2(scores - larger[:, None])
        total = total * shrink + gl.sum(probs, 1)
        largest = larger
        probs = gl.convert_layout(probs.to(gl.bfloat16), PROBS)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, MIXED))[:, None]

        mbarrier.wait(v_there, phase)
        acc = warpgroup_mma(probs, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()  # and the values
        ask(values, v, v_there, block + GROUPS, blocks)
    return acc, largest, total


@gluon.jit
def hand_over(
    q, k, v, k_there, v_there, keys, values, seen_ptr, S, seen_S, scale, handed, by_row,
    MASKED: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """What the second group does: its half, and the way of it to the first."""
    acc, largest, total = attend_half(
        q, k, v, k_there, v_there, keys, values, seen_ptr, S, seen_S, scale, 1, MASKED, HIDDEN
    )
    handed.store(acc)
    by_row.index(0).store(largest)
    by_row.index(1).store(total)


@gluon.jit
def attend_halves_kernel(
    queries, keys, values, seen_ptr, out_ptr, rows, S, seen_S, scale,
    MASKED: gl.constexpr, HIDDEN: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (rows / BLOCK_M,). queries, keys, values: [rows, H] and [S, H]; seen: [S], not read unless MASKED."""
    q = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, BLOCK_N, HEAD_DIM], SHARED)
    v = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, BLOCK_N, HEAD_DIM], SHARED)
    handed = gl.allocate_shared_memory(gl.float32, [BLOCK_M, HEAD_DIM], HANDED)
    by_row = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], BY_ROW)
    q_there = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_there = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    v_there = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_there.index(0), count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(k_there.index(i), count=1)
        mbarrier.init(v_there.index(i), count=1)
    barrier()
    wait_for_front(PDL)
    first = gl.program_id(0) * BLOCK_M
    blocks = (S + BLOCK_N - 1) // BLOCK_N
    mbarrier.expect(q_there.index(0), BLOCK_M * HEAD_DIM * 2)
    load_block(queries, [first, 0], q_there.index(0), q)
    for i in gl.static_range(GROUPS):
        ask(keys, k.index(i), k_there.index(i), i, blocks)
        ask(values, v.index(i), v_there.index(i), i, blocks)
    mbarrier.wait(q_there.index(0), 0)

    acc, largest, total = gl.warp_specialize(
        [
            (
                attend_half,
                (
                    q, k.index(0), v.index(0), k_there.index(0), v_there.index(0), keys, values, seen_ptr, S, seen_S,
                    scale, 0, MASKED, HIDDEN,
                ),
            ),
            (
                hand_over,
                (
                    q, k.index(1), v.index(1), k_there.index(1), v_there.index(1), keys, values, seen_ptr, S, seen_S,
                    scale, handed, by_row, MASKED, HIDDEN,
                ),
            ),
        ],
        [WARPS],
        [REGISTERS],
    )  # fmt: skip

    others = by_row.index(0).load(gl.SliceLayout(1, SCORES))  # -inf where the second group had no block
    larger = gl.maximum(largest, others)
    own, other = gl.exp2(largest - larger), gl.exp2(others - larger)
    total = own * total + other * by_row.index(1).load(gl.SliceLayout(1, SCORES))
    acc *= gl.convert_layout(own / total, gl.SliceLayout(1, MIXED))[:, None]
    acc += handed.load(MIXED) * gl.convert_layout(other / total, gl.SliceLayout(1, MIXED))[:, None]
    row = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, MIXED))
    h = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, MIXED))
    at = out_ptr + row[:, None] * HEAD_DIM + h[None, :]
    gl.store(at, acc.to(gl.bfloat16), mask=(row < rows)[:, None] & (h >= 0)[None, :])


def misfit(q_BTNH: Tensor, k_BSKH: Tensor) -> str:
    """Why it is not for such queries and keys; empty if it is."""
    (B, _, _, H), K = q_BTNH.shape, k_BSKH.shape[2]
    if B != 1 or K != 1 or HEAD_DIM.value != H:
        return f"batch {B}, {K} key/value heads of {H}: it takes batch 1 and one head of {HEAD_DIM.value}"
    return "" if q_BTNH.dtype is torch.bfloat16 else f"{q_BTNH.dtype}: it takes bfloat16"


@torch.library.custom_op("pi0exp::attend_halves", mutates_args=())
def attend_halves(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """softmax(scale q k^T) v: [1, T, N, H] of q's dtype, contiguous; arguments as in `attend_dense`.

    q contiguous; keys and values at addresses, and rows apart, that are multiples of 16 bytes. blind: must be False.
    Raises ValueError, see `misfit`.
    """
    check_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS)
    require(not (why := misfit(q_BTNH, k_BSKH)), why)
    require(not blind, "no query is blind in the prefill")
    require(q_BTNH.is_contiguous(), "the queries are not contiguous")
    (_, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    described = {}
    matrices = {
        "queries": (q_BTNH.view(T * N, H), BLOCK_M),
        "keys": (k_BSKH[0, :, 0], BLOCK_N),
        "values": (v_BSKH[0, :, 0], BLOCK_N),
    }
    for name, (matrix, block) in matrices.items():
        require(matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0, f"{name} are not aligned to 16 bytes")
        described[name] = TensorDescriptor.from_tensor(matrix, [block.value, H], SHARED.value)
    out_BTNH = torch.empty_like(q_BTNH)
    seen = q_BTNH if keys_BS is None else keys_BS  # not read if there is none, but a pointer it must be
    attend_halves_kernel[(triton.cdiv(T * N, BLOCK_M.value),)](
        **described, seen_ptr=seen, out_ptr=out_BTNH, rows=T * N, S=S, seen_S=seen.stride(1), scale=scale,
        MASKED=keys_BS is not None, HIDDEN=HIDDEN, num_warps=WARPS.value, **launch_behind(dependent(q_BTNH)),
    )  # fmt: skip
    return out_BTNH


@attend_halves.register_fake
def _(q_BTNH: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q_BTNH)


def _ahead(name: str, masked: bool) -> AheadOfTime:
    described = f"tensordesc<bf16[{BLOCK_M.value}, {HEAD_DIM.value}],{SHARED.value!r}>"
    types = dict.fromkeys(("queries", "keys", "values"), described)
    types |= {"seen_ptr": "*i1:16", "out_ptr": "*bf16:16", "rows": "i32", "S": "i32", "seen_S": "i32", "scale": "fp32"}
    constants = {"MASKED": masked, "HIDDEN": HIDDEN}
    return AheadOfTime(name, attend_halves_kernel, types, constants, WARPS.value, dots=True, targets=("sm_90",))


KERNELS = (
    Kernel(
        name="attend_halves",
        op=attend_halves,
        reference=attend_reference,
        cases=(
            attention_case("prefill, 3 cameras", GEMMA, T=788, S=788),
            attention_case("prefill, 2 cameras", GEMMA, T=532, S=532),
            attention_case("prefill, prompt of 200", GEMMA, T=968, S=968),
            attention_case("prefill, middle camera absent", GEMMA, T=788, S=788, hidden=(256, 512)),
            attention_case("keys and values in a larger cache", GEMMA, T=70, S=133, room=150, pi0=False),
            attention_case("one block of keys", GEMMA, T=5, S=37, room=40, pi0=False),
            attention_case("the first keys hidden", GEMMA, T=9, S=150, hidden=(0, 130), pi0=False),
        ),
        ahead_of_time=also_dependent(_ahead("all keys", masked=False), _ahead("hidden keys", masked=True)),
        libraries=LIBRARIES,
        interpretable=False,
    ),
)
