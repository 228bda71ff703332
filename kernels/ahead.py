"""Weights of a later kernel, asked for now: a chain of short kernels whose memory is never idle.

A kernel of a denoising step reads its weight in 1 to 6 us and spends about as long on what cannot be hidden: starting,
waiting for the kernel in front, adding up. Meanwhile nothing is read. So each also asks for the weight of a kernel that
comes later, which then finds it in the L2. A layer's weights are 35 MB, which an L2 of 50 MB holds; what was asked for
in vain costs its bytes once more and changes no value.

Only in dependent launches, which sm_90 has (the bulk prefetch of PTX is its own, too), and only for few rows: with more
the launches read without holding, and asking takes their bandwidth (experiments/speed.md).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 16
"""Rows up to which a launch asks."""
PIECE = tl.constexpr(1024)
"""Bytes of one request; a multiple of 16."""


@triton.jit
def ask(ahead_ptr, pieces):
    """The program's share of the `pieces` pieces at `ahead_ptr`, as many requests at a time as it has threads."""
    LANES: tl.constexpr = tl.extra.cuda.num_threads()
    across = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    me = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    share = tl.cdiv(pieces, across)
    begin = me * share
    end = tl.minimum(begin + share, pieces)
    for first in range(begin, end, LANES):
        piece = first + tl.arange(0, LANES)
        address = ahead_ptr.to(tl.int64) + piece.to(tl.int64) * PIECE
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0; }",
            "=r,l,r", [address, (piece < end).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def asked(ahead: Tensor | None, pdl: bool, rows: int) -> dict[str, Any]:
    """The arguments of a kernel that say which weight it asks for: whole pieces, a rest is left to who reads it."""
    wanted = ahead if pdl and rows <= FEW_ROWS else None
    return {"ahead_ptr": wanted, "ahead_pieces": 0 if wanted is None else wanted.nbytes // PIECE.value}
