"""Tensors from wherever they are into one buffer: the inputs of a graph, without a launch in front of it.

    out[start : start + bytes] = the bytes at the address        of each tensor
    mail[1] = mail[0]

A graph reads fixed addresses; its inputs are elsewhere at each call. Their addresses stand in a table in pinned memory,
which this kernel, the first of the graph, reads over the bus: a call writes eleven numbers where it would launch
copies, of which the first takes a tenth of a millisecond on a host that has just waited for its GPU. What is gathered
may be in pinned memory as well.

mail: what the host has written last, and back what has been gathered: it must not write the table again before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.kernel import AheadOfTime, require

BLOCK = 4096
"""Bytes of a program."""
WORD = tl.constexpr(4)


@triton.jit
def gather_kernel(table_ptr, places_ptr, out_ptr, BLOCK: tl.constexpr):
    """Grid (tensors, blocks of the largest). Words where all bytes stand in such, else single bytes."""
    i, first = tl.program_id(0), tl.program_id(1) * BLOCK
    start, size = tl.load(places_ptr + 2 * i), tl.load(places_ptr + 2 * i + 1)
    if first < size:
        address = tl.load(table_ptr + i, cache_modifier=".cv")
        if (address % WORD == 0) & (size % WORD == 0) & (start % WORD == 0):
            word = first // WORD + tl.arange(0, BLOCK // WORD)
            words = tl.load(address.to(tl.pointer_type(tl.int32)) + word, mask=word < size // WORD)
            tl.store((out_ptr + start).to(tl.pointer_type(tl.int32)) + word, words, mask=word < size // WORD)
        else:
            byte = first + tl.arange(0, BLOCK)
            found = tl.load(address.to(tl.pointer_type(tl.uint8)) + byte, mask=byte < size)
            tl.store(out_ptr + start + byte, found, mask=byte < size)


@triton.jit
def gather_answer_kernel(mail_ptr):
    """One program, behind all of the others."""
    tl.store(mail_ptr + 1, tl.load(mail_ptr, cache_modifier=".cv"))


def gather(table_N: Tensor, places_N2: Tensor, out: Tensor, mail_2: Tensor, most: int) -> None:
    """Gathers N tensors by address into `out`, uint8, and answers the mail.

    table: int64, addresses that the device can read. places: int64 on the device, where each begins in out and its
    bytes, of which `most` is the largest number. mail: int64. table and mail are pinned, or on the device. Raises
    ValueError. No operator of torch: what it reads stands in none of its arguments.
    """
    count = table_N.shape[0]
    require(table_N.dtype is places_N2.dtype is mail_2.dtype is torch.int64, "table, places and mail must be int64")
    require(places_N2.shape == (count, 2) and places_N2.is_contiguous(), f"places are {list(places_N2.shape)}")
    require(out.dtype is torch.uint8 and out.is_contiguous() and mail_2.shape == (2,), "out must be bytes, mail [2]")
    gather_kernel[(count, max(1, triton.cdiv(most, BLOCK)))](
        table_ptr=table_N, places_ptr=places_N2, out_ptr=out, BLOCK=BLOCK
    )
    gather_answer_kernel[(1,)](mail_ptr=mail_2, num_warps=1)


_TYPES = {"table_ptr": "*i64:16", "places_ptr": "*i64:16", "out_ptr": "*u8:16", "mail_ptr": "*i64:16"}
AHEAD_OF_TIME = (
    AheadOfTime("bytes", gather_kernel, _TYPES, {"BLOCK": BLOCK}),
    AheadOfTime("answer", gather_answer_kernel, _TYPES, {}, num_warps=1),
)
