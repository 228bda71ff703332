"""The weights of a denoising step in the order in which the programs of `stream_layers` read them, and its tiles.

A matrix instruction wants certain values of its operands in certain lanes. Operands lie in memory in that order, so
that a plain load, 16 bytes a thread, brings each where it is used, and none goes through shared memory: not the
weights, which could not be held over a meeting otherwise (what arrives must be stored first), and not x.

    a tile of R rows:  [K / (G BK), R / 8, BK / 32, G, 8 rows, 4, 2, 2, 2]     k = 32 a + 16 d + 8 e + 2 c + f
    x:                 [K / (G BK), BK / 32, 2, G, 8 rows, 4, 2, 2, 2]         m = 8 b + row, k alike

a, b stand in front of G, and c, d, e, f behind the rows (PTX ISA, mma.m16n8k16). A thread's 16 bytes are of one row, so
rows of x that are not there are not read.

Shapes: L layers, C rows of a weight, D width of the residual stream, K width in, F hidden width, N query heads, H head
dim, G warps that share K, each BK of it at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.kernel import INTERPRETED

ROWS = tl.constexpr(16)
"""Rows of a tile of x: what a matrix instruction takes."""
PAIRS = tl.constexpr(16)
"""Pairs of a head that a tile of queries, keys or values has: 32 rows of the weight."""
HIDDEN_COLUMNS = tl.constexpr(32)
"""Columns of the hidden layer of a tile: 64 rows of the gated weight."""
COLUMNS = tl.constexpr(8)
"""Columns of the residual stream of a tile; their squares are summed by one program."""
MIXED = tl.constexpr(16)
"""Columns of a head that one program puts together from all parts of the keys."""


@dataclass(frozen=True)
class Shape:
    """How the kernel is launched.

    GROUPS warps share K, each CHUNK of it at a time at most; blocks of BN keys; EARLY: chunks of the hidden layer's
    weight that are read a meeting before the others.
    """

    GROUPS: int = 8
    CHUNK: int = 64
    BN: int = 64
    EARLY: int = 1

    def constants(self, D: int, N: int, H: int, F: int) -> dict[str, int]:
        """Fewer groups where a width is no multiple of 32 times so many."""
        groups = max(g for g in (1, 2, 4, 8, 16) if g <= self.GROUPS and not any(K % (32 * g) for K in (D, N * H, F)))

        def of(K: int) -> int:
            return max(size for size in (32, 64, 128, 256) if size <= self.CHUNK and K % (size * groups) == 0)

        early = min(self.EARLY, D // (groups * of(D)))
        return {"G": groups, "BN": self.BN, "BK_D": of(D), "BK_OUT": of(N * H), "BK_F": of(F), "EARLY": early}


LAUNCH = Shape(BN=16) if INTERPRETED else Shape()


def unfit(D: int, H: int, F: int, N: int) -> str:
    """Why the kernel cannot take a model of these widths; "" if it can."""
    if odd := [f"{name} = {size}" for name, size in (("D", D), ("F", F), ("N H", N * H)) if size % 32]:
        return f"{' and '.join(odd)}: no multiple of 32"
    return "" if triton.next_power_of_2(H) == H and H >= 32 else f"a head dim of {H} is no power of two from 32 on"


class Weights(NamedTuple):
    """Of all layers, as they are or, by `pack`, in the order in which programs read them."""

    qkv_LCD: Tensor
    out_LDK: Tensor
    gate_up_LCD: Tensor
    down_LDF: Tensor


def pack(weights: Weights, H: int) -> Weights:
    """Halves of a head's pairs, and of gate and up, tile by tile; each tile in the order of registers."""
    (L, C, D), K, F = weights.qkv_LCD.shape, weights.out_LDK.shape[2], weights.down_LDF.shape[2]
    c, hidden = LAUNCH.constants(D, K // H, H, F), HIDDEN_COLUMNS.value
    qkv = weights.qkv_LCD.view(L, C // H, 2, H // 2 // PAIRS.value, PAIRS.value, D).transpose(2, 3).reshape(L, C, D)
    gate_up = weights.gate_up_LCD.view(L, 2, F // hidden, hidden, D).transpose(1, 2).reshape(L, 2 * F, D)
    return Weights(
        packed_tiles(qkv, 2 * PAIRS.value, c["G"], c["BK_D"]),
        packed_tiles(weights.out_LDK, COLUMNS.value, c["G"], c["BK_OUT"]),
        packed_tiles(gate_up, 2 * hidden, c["G"], c["BK_D"]),
        packed_tiles(weights.down_LDF, COLUMNS.value, c["G"], c["BK_F"]),
    )


def unpack(packed: Weights, H: int) -> Weights:
    """The weights as `pack` was given them."""

    def flat(weights: Weights) -> Tensor:
        return torch.cat([weight.flatten() for weight in weights])

    return unordered(flat(packed), [tuple(w.shape) for w in packed], lambda plain: flat(pack(plain, H)))


def unordered(values: Tensor, sizes: Sequence[tuple[int, ...]], order: Callable[[Weights], Tensor]) -> Weights:
    """The weights, of these sizes, of which `order` made `values`; zeros that it may have added are left out."""
    # Where each value went; 0 is what was added.
    ends = [0, *accumulate(prod(size) for size in sizes)]
    numbers = torch.arange(1, ends[-1] + 1, device=values.device)
    spans = list(zip(pairwise(ends), sizes, strict=True))
    plain = values.new_empty(ends[-1] + 1)
    went = order(Weights(*(numbers[first:last].view(size) for (first, last), size in spans)))
    plain[went.flatten()] = values.flatten()
    return Weights(*(plain[1:][first:last].view(size) for (first, last), size in spans))


def packed_tiles(weight_LCK: Tensor, R: int, G: int, BK: int) -> Tensor:
    """The weights of all layers, whose rows are in the order of tiles of R, in the order of registers."""
    L, C, K = weight_LCK.shape
    cut = weight_LCK.reshape(L, C // R, R // 8, 8, K // (G * BK), G, BK // 32, 2, 2, 4, 2)
    return cut.permute(0, 1, 4, 2, 6, 5, 3, 9, 7, 8, 10).contiguous().view(L, C, K)


@triton.jit
def place(m, k, G: tl.constexpr, BK: tl.constexpr):
    """Where x[m, k] lies."""
    inner = k % BK
    block = (((k // (G * BK)) * (BK // 32) + inner // 32) * 2 + m // 8) * G + (k // BK) % G
    return block * 256 + (m % 8) * 32 + (inner % 8 // 2) * 8 + (inner % 32 // 8) * 2 + inner % 2
