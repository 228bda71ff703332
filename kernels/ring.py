"""A ring of chunks of weights in shared memory, and products from it (for `stream_ring`).

In Triton's explicit dialect, Gluon, since what matters here Triton decides by itself: where a weight waits until it is
multiplied. Values are in the order of the matrix instruction's lanes throughout (`stream_pack`), so that no operand of
a product changes its layout.

Shapes: M rows (at most ROWS), K width in, R rows of a tile of a weight, G warps that share K; in a kernel M is ROWS.
"""

from typing import Any  # noqa: F401 (in comments for the checker: Gluon takes no annotated variables)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from pi0exp.kernels.stream_pack import COLUMNS

# What later versions of Triton call by another name.
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

ROWS = gl.constexpr(16)
G = gl.constexpr(8)
CHUNK_ROWS, CHUNK_WIDTH = gl.constexpr(256), gl.constexpr(64)
"""A chunk of a weight as the copy engine sees it: 32 KB, the largest block that it takes."""
SLOTS = gl.constexpr(6)
"""More do not fit beside what layouts are changed through: 227 KB a multiprocessor."""
ASK_QKV, ASK_ATTENTION, ASK_MIXING, ASK_OUT, ASK_DOWN = map(gl.constexpr, (2, 2, 1, 1, 1))
"""Chunks that a program asks for behind each phase; behind the hidden layer those of w_qkv, if it has any.

The fastest of eight such rows that were tried (experiments/speed.md); `ring_pack.misfit` proves that none can wait for
what was not asked for, or ask for more than there is room for."""
RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# ---- layouts

CHUNK = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
"""16 bytes a thread, 32 rows at a time: the flat order of `stream_pack`, G warps one behind the other."""
FLAT = gl.constexpr(gl.BlockedLayout([8], [32], [8], [0]))
FLAT_4 = gl.constexpr(gl.BlockedLayout([4], [32], [8], [0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1, 1], instr_shape=[1, 16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, PRODUCT, 2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 8], instr_shape=[16, 8]))
SCORES_LEFT = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))
SCORES_RIGHT = gl.constexpr(gl.DotOperandLayout(1, SCORES, 2))
CACHE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
"""Rows of keys, values or queries, 16 bytes a thread."""
SUMS_8 = gl.constexpr(gl.BlockedLayout([1, 1, 8], [4, 8, 1], [8, 1, 1], [2, 1, 0]))
SUMS_32 = gl.constexpr(gl.BlockedLayout([1, 2, 8], [2, 16, 1], [8, 1, 1], [2, 1, 0]))
SUMS_PAIRS = gl.constexpr(gl.BlockedLayout([1, 1, 2, 8], [2, 16, 1, 1], [8, 1, 1, 1], [3, 2, 1, 0]))
TILE_8 = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [8, 1], [1, 0]))
TILE_16 = gl.constexpr(gl.BlockedLayout([1, 1], [2, 16], [8, 1], [1, 0]))
TILE_32 = gl.constexpr(gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0]))
SQUARES = gl.constexpr(gl.BlockedLayout([1, 1], [16, 2], [1, 8], [0, 1]))


# ---- the ring


@gluon.jit
def ask(weights, ring, ready, first, total, base, COUNT: gl.constexpr):
    """Starts the copies of COUNT chunks of this program from number `first` on, of those that it has.

    base: number of the program's first chunk among all. Slots stand free: their chunks were taken before a barrier.
    """
    for i in gl.static_range(COUNT):
        mbarrier.expect(ready.index((first + i) % SLOTS), CHUNK_ROWS * CHUNK_WIDTH * 2, pred=first + i < total)
    for i in gl.static_range(COUNT):
        slot = (first + i) % SLOTS
        row = (base + first + i) * CHUNK_ROWS
        load_block(weights, [row, 0], ready.index(slot), ring.index(slot), pred=first + i < total)


@gluon.jit
def take(ring, ready, taken, R: gl.constexpr, BK: gl.constexpr):
    """The next chunk, [G, BK, R], as the right operand of a product."""
    slot = taken % SLOTS
    mbarrier.wait(ready.index(slot), (taken // SLOTS) & 1)
    w = gl.reshape(ring.index(slot).load(CHUNK), [R // 8, BK // 32, G, 8, 4, 2, 2, 2])
    w = gl.reshape(gl.permute(w, [2, 1, 5, 6, 4, 7, 0, 3]), [G, BK, R])
    return gl.convert_layout(w, RIGHT, assert_trivial=True)


# ---- products


@gluon.jit
def rows(x_ptr, step, M, BK: gl.constexpr):
    """x of one step of K, [G, M, BK], as the left operand."""
    SIZE: gl.constexpr = ROWS * G * BK
    i = gl.arange(0, SIZE, layout=FLAT)
    there = (i // (G * 256)) % 2 * 8 + (i // 32) % 8 < M
    x = gl.load(x_ptr + step * SIZE + i, mask=there, other=0.0, cache_modifier=".cg")
    x = gl.permute(gl.reshape(x, [BK // 32, 2, G, 8, 4, 2, 2, 2]), [2, 1, 3, 0, 5, 6, 4, 7])
    return gl.convert_layout(gl.reshape(x, [G, ROWS, BK]), LEFT, assert_trivial=True)


@gluon.jit
def all_rows(x_ptr, M, K: gl.constexpr, BK: gl.constexpr):
    """x of all steps: loads that none of the waiting for weights may hold up."""
    found = ()  # type: Any
    for step in gl.static_range(K // (G * BK)):
        found = found + (rows(x_ptr, step, M, BK),)  # noqa: RUF005
    return found


@gluon.jit
def narrow_product(x, ring, ready, taken, K: gl.constexpr, BK: gl.constexpr):
    """COLUMNS columns of x w^T, [M, COLUMNS] in TILE_8."""
    acc = gl.zeros([G, ROWS, COLUMNS], gl.float32, layout=PRODUCT)
    for step in gl.static_range(K // (G * BK)):
        acc = mma_v2(x[step], take(ring, ready, taken + step, COLUMNS, BK), acc)
    # All warps' sums of a value in one thread, so that nothing is left to add between threads.
    sums = gl.sum(gl.convert_layout(gl.permute(acc, [1, 2, 0]), SUMS_8), axis=2)
    return gl.convert_layout(sums, TILE_8)
