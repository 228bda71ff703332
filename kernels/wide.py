"""Products of up to 64 rows from a ring of weights in shared memory (for `stream_wide`).

Both operands come by the copy engine, in chunks that lie in one piece: the weight's as `wide_pack` has laid them, those
of x as `place` says. What x has in rows beyond the last reaches those rows of the product only, which nobody stores. A
warp group multiplies all rows by half of a tile's columns.

A chunk is one copy and one store, never several: the compiler sets a barrier between any two writes to one buffer.

Shapes: M rows (at most ROWS), K width in, N rows of a tile of a weight: 32 or 64; in a kernel M is ROWS.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from pi0exp.kernels.ring import barrier, load_block

ROWS = gl.constexpr(64)
WARPS = gl.constexpr(8)
BOX = gl.constexpr(64)
"""Rows and columns that a matrix instruction reads at once: 128 bytes a row, the widest that it can."""
BOXES = gl.constexpr(4)
"""One behind the other in a chunk: 32 KB, the largest block that the copy engine takes."""
SLOTS = gl.constexpr(3)
"""Chunks of weights, and as many of x; what is left of 227 KB a multiprocessor is for layouts that change."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# ---- layouts

SUMS_32 = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 16, 16]))
SUMS_64 = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]))
PROBS = gl.constexpr(gl.DotOperandLayout(0, SUMS_64, 2))
BOX_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
"""16 bytes a thread."""
TILE_8 = gl.constexpr(gl.BlockedLayout([1, 2], [8, 4], [8, 1], [1, 0]))
TILE_16 = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
TILE_32 = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))
SQUARES = gl.constexpr(gl.BlockedLayout([1, 1], [32, 1], [2, 4], [0, 1]))


# ---- what the copy engine brings


@triton.jit
def order_copies(i):
    """Between plain stores to global memory and copies of what they stored, on either side of a meeting."""
    return tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1
    )


@gluon.jit
def ask(weights, ring, ready, number, total, base):
    """Starts the copy of this program's chunk of that number, if there is one, to a slot that stands free.

    base: number of the program's first chunk among all.
    """
    slot = number % SLOTS
    mbarrier.expect(ready.index(slot), BOXES * BOX * BOX * 2, pred=number < total)
    row = (base + number) * (BOXES * BOX)
    load_block(weights, [row, 0], ready.index(slot), ring.index(slot), pred=number < total)


@gluon.jit
def ask_rows(x, rows, there, number, k):
    """Starts the copy of all rows of x, BOXES * BOX columns from k on, as the chunk of x of that number."""
    slot = number % SLOTS
    mbarrier.expect(there.index(slot), BOXES * BOX * BOX * 2)
    load_block(x, [k // BOX * ROWS, 0], there.index(slot), rows.index(slot))


@gluon.jit
def place(m, k):
    """Where x[m, k] lies."""
    return (k // BOX * ROWS + m) * BOX + k % BOX


@gluon.jit
def product(
    x, rows, there, seen, k, weights, ring, ready, taken, total, base, N: gl.constexpr, STEPS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """x w^T over STEPS chunks of x from column k on, [ROWS, N] in LAYOUT.

    seen, taken: chunks of x, and of weights, before this product. What comes SLOTS chunks behind its last SLOTS chunks
    of weights is left to `ask_later`: reads under way when a program comes to a meeting would hold it up.
    """
    TURNS: gl.constexpr = BOX // N  # chunks of x for one of the weight
    for i in gl.static_range(min(STEPS, SLOTS)):
        ask_rows(x, rows, there, seen + i, k + i * BOXES * BOX)
    acc = gl.zeros([ROWS, N], gl.float32, layout=LAYOUT)
    for i in gl.static_range(STEPS):
        chunk = taken + i // TURNS
        mbarrier.wait(ready.index(chunk % SLOTS), (chunk // SLOTS) & 1)
        mbarrier.wait(there.index((seen + i) % SLOTS), ((seen + i) // SLOTS) & 1)
        for j in gl.static_range(BOXES):
            x_box = rows.index((seen + i) % SLOTS).slice(j * ROWS, ROWS)
            w_box = ring.index(chunk % SLOTS).slice((i % TURNS * BOXES + j) * N, N)
            acc = warpgroup_mma(x_box, w_box.permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if i + SLOTS < STEPS:
            barrier()  # both warp groups have read
            ask_rows(x, rows, there, seen + i + SLOTS, k + (i + SLOTS) * BOXES * BOX)
            if i % TURNS == TURNS - 1 and i // TURNS + SLOTS < STEPS // TURNS:
                ask(weights, ring, ready, chunk + SLOTS, total, base)
    return acc


@gluon.jit
def ask_later(weights, ring, ready, taken, total, base, CHUNKS: gl.constexpr):
    """What a product of CHUNKS chunks of weights, the last that were taken, made room for and did not ask for."""
    for i in gl.static_range(min(SLOTS, CHUNKS)):
        ask(weights, ring, ready, taken - min(SLOTS, CHUNKS) + SLOTS + i, total, base)
