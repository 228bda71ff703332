"""What the kernels of a denoising step share. A step of Pi0 is a chain of products of few rows, a stream of weights.

    x' = x + gate * (h w^T)                             the residual stream, where a product ends a branch
    z  = (x' / rms(x') * (1 + scale) + shift) v^T       a norm, and the product that reads it
       = (x' * (1 + scale)) v^T / rms(x') + shift v^T

A norm is no kernel here: it needs whole rows, and a chain of kernels of 3 us has no room for one that waits for them.
The product that makes x' has the columns: it also writes xs = x' * (1 + scale), and of every SQUARES columns the sum of
squares of each row (`squares`). The product that reads xs divides its rows by rms(x') in its epilogue, where a shift,
which depends on the step alone, is a row `offset` = shift v^T. xs is rounded where the plain model rounds the normed
row, to the same relative error; only the shift is added after the product and never rounded.

A layer is then five launches: `stream_qkv`, `stream_attention`, `stream_residual`, `stream_gated`, `stream_residual`,
with `stream_begin` before the first layer and `stream_end` behind the last. All follow `skinny_gemm`: weights are read
before waiting for the kernel in front, split sums are added in the order of K by the program that comes last, so equal
inputs give equal bits. Weights, scales, offsets and tables of cosines must have been complete before the chain began.
Each launch may also ask for the weight of a later one, `ahead` (see there); that changes no value.

Shapes: B batch, T tokens, M = B T rows, D width of the residual stream, K width in, C rows of a weight, P groups
of columns (of `squares`), R rows of a tile of the weight; in a kernel M is the padded number of rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.ahead import asked
from pi0exp.kernels.dependent import dependent, launch_behind
from pi0exp.kernels.gemm_epilogue import DTYPES
from pi0exp.kernels.kernel import INTERPRETED, AheadOfTime, launchable, random, require
from pi0exp.kernels.skinny_gemm import COUNTERS, MAX_ROWS, Launch, check_counters, padded

SQUARES = 16
"""Columns of the residual stream whose squares are summed by one program, at most; tiles are multiples of it."""


@triton.jit
def inverse_rms(squares_ptr, m_M, M, D, eps, TILES: tl.constexpr, PADDED: tl.constexpr):
    """1 / rms of the rows m_M, whose sums of squares are [TILES, M]."""
    t_T = tl.arange(0, PADDED)
    inside = (t_T < TILES)[None, :] & (m_M < M)[:, None]
    squares_MT = tl.load(squares_ptr + t_T[None, :] * M + m_M[:, None], mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(squares_MT, axis=1) / D + tl.cast(eps, tl.float32))


def inverse_rms_reference(squares_PM: Tensor, width: int, eps: float, *shape: int) -> Tensor:
    """The same as a tensor of `shape`."""
    return torch.rsqrt(squares_PM.sum(dim=0) / width + eps).reshape(shape)


# ---- arguments


def rows_of(x_BTD: Tensor, weight_CK: Tensor) -> Tensor:
    """x as [M, K]. Raises ValueError where x and the weight are not for one another, or x has too many rows."""
    require(x_BTD.ndim == 3 and x_BTD.is_contiguous(), f"x is {list(x_BTD.shape)}: not [B, T, K], contiguous")
    require(
        weight_CK.ndim == 2 and weight_CK.is_contiguous() and x_BTD.shape[2] == weight_CK.shape[1],
        f"x is {list(x_BTD.shape)}, weight {list(weight_CK.shape)}: the last axes differ, or it is not contiguous",
    )
    require(
        x_BTD.dtype in DTYPES and weight_CK.dtype is x_BTD.dtype,
        f"x is {x_BTD.dtype}, weight {weight_CK.dtype}: wanted bfloat16, float16 or float32 for both",
    )
    x_MK = x_BTD.flatten(0, 1)
    require(0 < x_MK.shape[0] <= MAX_ROWS, f"x has {x_MK.shape[0]} rows; a stream takes 1 to {MAX_ROWS}")
    return x_MK


def check_squares(squares_PM: Tensor, rows: int) -> None:
    """Raises ValueError for other sums of squares than those of `rows` rows."""
    good = squares_PM.ndim == 2 and squares_PM.shape[1] == rows and squares_PM.dtype is torch.float32
    require(good and squares_PM.is_contiguous(), f"squares are {squares_PM.dtype} {list(squares_PM.shape)}: not [P, M]")


def check_vector(name: str, vector: Tensor | None, length: int) -> None:
    """Raises ValueError for another vector than one of `length` adjacent values."""
    good = vector is None or (vector.shape == (length,) and vector.is_contiguous())
    require(good, f"{name} is {None if vector is None else list(vector.shape)}: not [{length}], contiguous")


# ---- launch


def launch_stream(
    kernel: Any, launch: Launch, x_MK: Tensor, weight_CK: Tensor, counters: Tensor, ahead: Tensor | None, tiles: int,
    rows: int, **own: Any,
) -> None:  # fmt: skip
    """Run a kernel that begins with `skinny_gemm.summed`, `rows` rows of the weight a tile."""
    M, K = x_MK.shape
    check_counters(counters, tiles)
    parts = counters
    if launch.SPLITS > 1:
        parts = x_MK.new_empty((tiles, launch.SPLITS, padded(M), rows), dtype=torch.float32)
    pdl = dependent(x_MK, launch.pdl)
    launchable(kernel)[(tiles, launch.SPLITS)](
        x_ptr=x_MK, weight_ptr=weight_CK, parts_ptr=parts, counters_ptr=counters, **asked(ahead, pdl, M), M=M, K=K,
        **own, **launch.constants(K), BM=padded(M), UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **launch_behind(pdl),
    )  # fmt: skip


# ---- cases and compiles without a GPU


def positive(generator: torch.Generator, device: torch.device, tiles: int, rows: int, width: int) -> Tensor:
    """Sums of squares of rows of order one."""
    return (0.2 + random(generator, device, tiles, rows, dtype=torch.float32).abs()) * (width / tiles)


def counters_on(device: torch.device) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def compiled_stream(
    name: str, kernel: Any, launch: Launch, rows: int, K: int, types: dict[str, str], **constants: Any
) -> AheadOfTime:
    """A compile of a kernel that `launch_stream` runs; one with dependent launch is for NVIDIA only."""
    given = dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16:16") | {"parts_ptr": "*fp32:16", "counters_ptr": "*i32:16"}
    given |= {"ahead_ptr": "*bf16:16", "ahead_pieces": "i32", "M": "i32", "K": "i32:16"} | types
    fixed: dict[str, Any] = launch.constants(K) | {"BM": padded(rows), "PDL": False, "UPCAST": False} | constants
    fixed |= {} if fixed["PDL"] else {"ahead_ptr": None}
    kinds = {argument: kind for argument, kind in given.items() if argument not in fixed}
    targets = ("sm_90",) if fixed["PDL"] else ("gfx942", "gfx950", "sm_90")
    return AheadOfTime(
        name, kernel, kinds, fixed, launch.num_warps, launch.num_stages, dots=True, targets=targets
    )  # fmt: skip
