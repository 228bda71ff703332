"""Attention of the prefill on Hopper: the scores of a block of keys while those before them become probabilities.

The maths is that of `attention`. There a program multiplies, waits, and takes the softmax while its matrix unit rests:
on an H100 the prefill's takes 22.5 us, a third of what the unit could do (experiments/speed.md). Here the product of
queries and the next block of keys is under way meanwhile; keys and values come by the copy engine, two blocks of each.

One program for BLOCK_M rows, a token's query heads one after the other, which share one key/value head. For one
observation, in bf16. In Gluon, as `stream_ring`, and tested alike: off such a GPU its compilation, and its values by
the small interpreter of the tests.

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
from pi0exp.kernels.kernel import AheadOfTime, Kernel, require
from pi0exp.kernels.ring import barrier, load_block

BLOCK_M, BLOCK_N = gl.constexpr(64), gl.constexpr(64)
HEAD_DIM = gl.constexpr(256)
WARPS = 4
SLOTS = gl.constexpr(2)
"""Blocks of keys, and of values, in shared memory: 128 KB beside 32 of queries."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
MIXED = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
PROBS = gl.constexpr(gl.DotOperandLayout(0, MIXED, 2))
OUT = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
"""16 bytes a thread, a row a warp."""


@gluon.jit
def ask(rows, buffer, there, block, end):
    """Starts the copy of a block of keys or values into its slot, which stands free, if there is such a block."""
    slot = block % SLOTS
    mbarrier.expect(there.index(slot), BLOCK_N * HEAD_DIM * 2, pred=block < end)
    load_block(rows, [block * BLOCK_N, 0], there.index(slot), buffer.index(slot), pred=block < end)


@gluon.jit
def attend_ahead_kernel(
    queries, keys, values, seen_ptr, out_ptr, rows, S, seen_S, scale, MASKED: gl.constexpr, HIDDEN: gl.constexpr
):
    """Grid (rows / BLOCK_M,). queries, keys, values: [rows, H] and [S, H]; seen: [S], not read unless MASKED."""
    q = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK_N, HEAD_DIM], SHARED)
    v = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK_N, HEAD_DIM], SHARED)
    q_there = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_there = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_there = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_there.index(0), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_there.index(i), count=1)
        mbarrier.init(v_there.index(i), count=1)
    barrier()
    first = gl.program_id(0) * BLOCK_M
    blocks = (S + BLOCK_N - 1) // BLOCK_N
    mbarrier.expect(q_there.index(0), BLOCK_M * HEAD_DIM * 2)
    load_block(queries, [first, 0], q_there.index(0), q)
    for i in gl.static_range(SLOTS):
        ask(keys, k, k_there, i, blocks)
        ask(values, v, v_there, i, blocks)

    to_log2 = gl.cast(scale, gl.float32) * 1.4426950408889634
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, layout=MIXED)
    largest = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=SCORES)
    mbarrier.wait(q_there.index(0), 0)
    mbarrier.wait(k_there.index(0), 0)
    scores = warpgroup_mma(q, k.index(0).permute([1, 0]), nothing, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    for block in range(blocks):
        # Behind the last block: scores that nobody uses, of what stands in the slot.
        slot, phase, next_slot = block % SLOTS, (block // SLOTS) & 1, (block + 1) % SLOTS
        mbarrier.wait(k_there.index(next_slot), ((block + 1) // SLOTS) & 1, pred=block + 1 < blocks)
        following = warpgroup_mma(q, k.index(next_slot).permute([1, 0]), nothing, is_async=True)

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

        mbarrier.wait(v_there.index(slot), phase)
        acc = warpgroup_mma(probs, v.index(slot), acc, is_async=True)
        scores, acc = warpgroup_mma_wait(0, deps=[following, acc])
        barrier()  # all warps have read the slots
        ask(keys, k, k_there, block + SLOTS, blocks)
        ask(values, v, v_there, block + SLOTS, blocks)

    acc /= gl.convert_layout(total, gl.SliceLayout(1, MIXED))[:, None]
    out = gl.convert_layout(acc.to(gl.bfloat16), OUT)
    row = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
    h = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    gl.store(out_ptr + row[:, None] * HEAD_DIM + h[None, :], out, mask=(row < rows)[:, None] & (h >= 0)[None, :])


def misfit(q_BTNH: Tensor, k_BSKH: Tensor) -> str:
    """Why it is not for such queries and keys; empty if it is."""
    (B, _, _, H), K = q_BTNH.shape, k_BSKH.shape[2]
    if B != 1 or K != 1 or HEAD_DIM.value != H:
        return f"batch {B}, {K} key/value heads of {H}: it takes batch 1 and one head of {HEAD_DIM.value}"
    return "" if q_BTNH.dtype is torch.bfloat16 else f"{q_BTNH.dtype}: it takes bfloat16"


@torch.library.custom_op("pi0exp::attend_ahead", mutates_args=())
def attend_ahead(
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
    attend_ahead_kernel[(triton.cdiv(T * N, BLOCK_M.value),)](
        **described, seen_ptr=seen, out_ptr=out_BTNH, rows=T * N, S=S, seen_S=seen.stride(1), scale=scale,
        MASKED=keys_BS is not None, HIDDEN=HIDDEN, num_warps=WARPS,
    )  # fmt: skip
    return out_BTNH


@attend_ahead.register_fake
def _(q_BTNH: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q_BTNH)


def _ahead(name: str, masked: bool) -> AheadOfTime:
    described = f"tensordesc<bf16[{BLOCK_M.value}, {HEAD_DIM.value}],{SHARED.value!r}>"
    types = dict.fromkeys(("queries", "keys", "values"), described)
    types |= {"seen_ptr": "*i1:16", "out_ptr": "*bf16:16", "rows": "i32", "S": "i32", "seen_S": "i32", "scale": "fp32"}
    constants = {"MASKED": masked, "HIDDEN": HIDDEN}
    return AheadOfTime(name, attend_ahead_kernel, types, constants, WARPS, dots=True, targets=("sm_90",))


KERNELS = (
    Kernel(
        name="attend_ahead",
        op=attend_ahead,
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
        ahead_of_time=(_ahead("all keys", masked=False), _ahead("hidden keys", masked=True)),
        libraries=LIBRARIES,
        interpretable=False,
    ),
)
