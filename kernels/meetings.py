"""Meetings of all programs of a persistent kernel (`stream_layers`, and in Gluon `stream_ring`).

A meeting is a count in memory: each program adds one when it has written what others are to read, and goes on when all
have. All programs must run at once. What others have written is to be read past the L1 (`.cg`).
"""

import triton
import triton.language as tl


@triton.jit
def come(slots_ptr, slot, clocks_ptr, ALONE: tl.constexpr):
    """This program has written what others are to read. Reads that shall not hold it up come after this."""
    if clocks_ptr is not None:
        stamp(clocks_ptr, 2 * slot)
    tl.debug_barrier()  # one thread counts for all of them, so all must have stored
    if not ALONE:
        tl.atomic_add(slots_ptr + slot, 1, sem="release")


@triton.jit
def meet(slots_ptr, slot, clocks_ptr, ALONE: tl.constexpr):
    """Returns when all programs of the grid have come, and shows each what the others had written.

    slots: int32, zeros; the one before `slot` is made zero again, since nobody can be waiting there any more. ALONE:
    the only program.
    """
    if not ALONE:
        everyone = tl.num_programs(0)
        wait_until(slots_ptr + slot, everyone)
        if (tl.program_id(0) == 0) & (slot > 0):
            tl.store(slots_ptr + slot - 1, 0)
    tl.debug_barrier()
    if clocks_ptr is not None:
        stamp(clocks_ptr, 2 * slot + 1)


@triton.jit
def stamp(clocks_ptr, i):
    """The multiprocessor's clock, in row i of [.., programs]: even rows of coming, odd ones of being let through."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %clock64; // $1", "=l,r", [i], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(clocks_ptr + i * tl.num_programs(0) + tl.program_id(0), now)


@triton.jit
def wait_until(at, everyone):
    """One thread asks, so that the others' questions do not stand in the way of who comes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred again;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        mov.u32 $0, 0;
        setp.ne.u32 again, thread, 0;
        @again bra GO;
        AGAIN:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 again, $0, $2;
        @again bra AGAIN;
        GO:
        }""",
        "=&r,l,r",
        [at, everyone],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def leave(slots_ptr, last_slot, ALONE: tl.constexpr):
    """At the end of the kernel: the last program to come makes the last meeting's slot zero, and its own."""
    if not ALONE:
        own = slots_ptr + last_slot + 1
        if tl.atomic_add(own, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(slots_ptr + last_slot, 0)
            tl.store(own, 0)
