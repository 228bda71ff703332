"""The hidden values of a denoising step's MLP in one launch: both products, norm, gated GELU.

    z = (xs w^T) / rms + offset            w: gate's rows, then up's
    hidden = gelu_tanh(z[..., :F]) * z[..., F:]

A tile has the same columns of gate and of up. The norm's scheme, and the axes' letters, stand in `stream`; F hidden
width.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.gemm_epilogue import activate
from pi0exp.kernels.kernel import Case, Kernel, random, require, wide
from pi0exp.kernels.skinny_gemm import OTHERS, Launch, halves, summed
from pi0exp.kernels.stream import (
    check_squares,
    check_vector,
    compiled_stream,
    counters_on,
    inverse_rms,
    inverse_rms_reference,
    launch_stream,
    positive,
    rows_of,
)
from pi0exp.kernels.stream_launch import START, product_launch


def stream_gated_reference(
    xs_BTD: Tensor,
    squares_PM: Tensor,
    weight_CD: Tensor,
    offset_C: Tensor | None,
    eps: float,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> Tensor:
    """The maths above: [B, T, F]."""
    B, T, D = xs_BTD.shape
    dtype = wide(xs_BTD, offset_C)
    z_BTC = F.linear(xs_BTD.to(dtype), weight_CD.to(dtype)) * inverse_rms_reference(squares_PM, D, eps, B, T, 1)
    gate_BTF, up_BTF = (z_BTC if offset_C is None else z_BTC + offset_C).chunk(2, dim=-1)
    return (F.gelu(gate_BTF, approximate="tanh") * up_BTF).to(xs_BTD.dtype)


@triton.jit
def stream_gated_kernel(
    x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, squares_ptr, offset_ptr, y_ptr, M, K, N, eps,
    TILES: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, X_LEFT: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """BN of the N hidden columns: BN rows of gate, BN of up. Grid (tiles of N, SPLITS)."""
    first = tl.program_id(0) * BN
    r_R = tl.arange(0, 2 * BN)
    n_R = first + r_R % BN
    # Columns past the end read column 0 again; they are not stored.
    row_R = tl.where(n_R < N, n_R, 0) + (r_R // BN) * N
    acc, last = summed(
        x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, row_R, M, K, K,
        2 * BN, BM, BK, STEPS, SPLITS, GROUPS, HELD, X_LEFT, PDL, EVEN_K, UPCAST,
    )  # fmt: skip
    if last:
        m_M = tl.arange(0, BM)
        n_1N = (first + tl.arange(0, BN))[None, :]
        gate, up = halves(acc, BM, BN)
        by_row = inverse_rms(squares_ptr, m_M, M, K, eps, TILES, PADDED)[:, None]
        gate, up = gate * by_row, up * by_row
        if offset_ptr is not None:
            gate += tl.load(offset_ptr + n_1N, mask=n_1N < N, other=0.0)
            up += tl.load(offset_ptr + N + n_1N, mask=n_1N < N, other=0.0)
        y = activate(gate, "gelu_tanh") * up
        inside = (m_M < M)[:, None] & (n_1N < N)
        tl.store(y_ptr + m_M[:, None] * N + n_1N, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton_op("pi0exp::stream_gated", mutates_args=("counters",))
def stream_gated(
    xs_BTD: Tensor,
    squares_PM: Tensor,
    weight_CD: Tensor,
    offset_C: Tensor | None,
    eps: float,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> Tensor:
    """gelu(gate) * up, [B, T, F].

    xs: [B, T, D] and squares: float32 [P, B T], of `stream_residual`. weight: [2 F, D] of xs's dtype. offset: float32
    [2 F] or None. counters: as in `skinny_gemm`. ahead: as in `stream`.
    At most 64 rows. Raises ValueError.
    """
    x_MK = rows_of(xs_BTD, weight_CD)
    B, T, _ = xs_BTD.shape
    C = weight_CD.shape[0]
    require(C % 2 == 0, f"a gated weight has an even number of rows, not {C}")
    check_squares(squares_PM, B * T)
    check_vector("offset", offset_C, C)
    launch = product_launch("stream_gated", B * T, weight_CD)
    y_BTF = xs_BTD.new_empty((B, T, C // 2))
    launch_stream(
        stream_gated_kernel, launch, x_MK, weight_CD, counters, ahead, triton.cdiv(C // 2, launch.BN), 2 * launch.BN,
        squares_ptr=squares_PM, offset_ptr=offset_C, y_ptr=y_BTF, N=C // 2, eps=eps, TILES=squares_PM.shape[0],
        PADDED=triton.next_power_of_2(squares_PM.shape[0]),
    )  # fmt: skip
    return y_BTF


# ---- cases


def _arguments(
    generator: torch.Generator, device: torch.device, shape: tuple[int, ...], tiles: int, offset: bool,
    dtype: torch.dtype, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    B, T, D, F_ = shape
    return (
        random(generator, device, B, T, D, dtype=dtype),
        positive(generator, device, tiles, B * T, D),
        random(generator, device, 2 * F_, D, dtype=dtype) * D**-0.5,
        random(generator, device, 2 * F_, dtype=torch.float32) if offset else None,
        eps,
        counters_on(device),
    )


def _case(
    name: str, B: int, T: int, D: int, F: int, *, tiles: int, offset: bool = False,
    dtype: torch.dtype = torch.bfloat16, small: bool = False, pi0: bool = False,
) -> Case:  # fmt: skip
    moved = float((2 * F * D + B * T * (D + F)) * dtype.itemsize)
    make = partial(
        _arguments, shape=(B, T, D, F), tiles=tiles, offset=offset, dtype=dtype, eps=1e-6 if pi0 else 0.5
    )  # fmt: skip
    return Case(name, make, 4.0 * B * T * F * D, moved, pi0=pi0, small=small, terms=D)


def _ahead(name: str, launch: Any, rows: int, **constants: Any) -> Any:
    types = {"squares_ptr": "*fp32:16", "offset_ptr": "*fp32:16", "y_ptr": "*bf16:16", "N": "i32:16", "eps": "fp32"}
    return compiled_stream(
        name, stream_gated_kernel, launch, rows, 1024, types, TILES=64, PADDED=64, **constants
    )  # fmt: skip


KERNELS = (
    Kernel(
        "stream_gated",
        stream_gated,
        stream_gated_reference,
        cases=(
            *(
                _case(f"denoise, {T} rows", 1, T, 1024, 4096, tiles=64, offset=offset, pi0=True)
                for T, offset in ((11, False), (10, False), (51, False), (50, True))
            ),
            _case("small", 1, 3, 32, 96, tiles=2, small=True),
            _case("small, odd sizes, offset", 2, 3, 45, 37, tiles=3, offset=True, small=True),
            _case("small, float32", 2, 2, 45, 37, tiles=3, offset=True, dtype=torch.float32, small=True),
        ),
        ahead_of_time=(
            _ahead("any GPU", OTHERS, 11, offset_ptr=None),
            _ahead("held and split, offset", Launch(16, 128, SPLITS=4, HELD=True), 50),
            _ahead("10 rows, dependent launch", START["sm_90"]["stream_gated 16 8192x1024"], 10, offset_ptr=None,
                PDL=True),
            _ahead("50 rows, dependent launch", START["sm_90"]["stream_gated 64 8192x1024"], 50, PDL=True),
        ),
    ),
)  # fmt: skip
