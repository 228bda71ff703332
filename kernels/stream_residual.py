"""The end of a branch in a denoising step in one launch: product, gate, residual sum, and the next norm's columns.

    x' = x + gate * (h w^T)                kept in the dtype of x
    xs = x' * (1 + scale)                  of x' as it is kept, rounded once more
    squares[p, m] = sum of x'[m, n]^2      over the SQUARES columns n of group p, of x' before it is rounded

The norm's scheme, and the axes' letters, stand in `stream`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.kernel import Case, Kernel, random, require, wide
from pi0exp.kernels.skinny_gemm import OTHERS, Launch, summed
from pi0exp.kernels.stream import SQUARES, check_vector, compiled_stream, counters_on, launch_stream, rows_of
from pi0exp.kernels.stream_launch import START, product_launch


def squares_reference(x_BTD: Tensor, width: int) -> Tensor:
    """Sums of squares of every `width` columns: [P, B T], in float32 or wider."""
    x_MD = x_BTD.to(wide(x_BTD)).flatten(0, 1)
    return torch.stack([part_MW.square().sum(dim=1) for part_MW in x_MD.split(width, dim=1)])


def stream_residual_reference(
    h_BTK: Tensor,
    weight_DK: Tensor,
    x_BTD: Tensor,
    gate_D: Tensor | None,
    scale_D: Tensor,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maths above: x', xs, squares."""
    dtype = wide(h_BTK, gate_D)
    branch_BTD = F.linear(h_BTK.to(dtype), weight_DK.to(dtype))
    branch_BTD = branch_BTD if gate_D is None else branch_BTD * gate_D
    wide_BTD = x_BTD.to(dtype) + branch_BTD
    sum_BTD = wide_BTD.to(x_BTD.dtype)
    xs_BTD = (sum_BTD.to(dtype) * (1.0 + scale_D)).to(x_BTD.dtype)
    return sum_BTD, xs_BTD, squares_reference(wide_BTD, SQUARES)


@triton.jit
def stream_residual_kernel(
    x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, residual_ptr, gate_ptr, scale_ptr,
    sum_ptr, xs_ptr, squares_ptr, M, K, N, SQUARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, X_LEFT: tl.constexpr, PDL: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """BN of the N columns of the residual stream. Grid (tiles of N, SPLITS)."""
    first = tl.program_id(0) * BN
    n_N = first + tl.arange(0, BN)
    # Columns past the end read column 0 again; they count as zeros.
    acc, last = summed(
        x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, tl.where(n_N < N, n_N, 0), M, K, K,
        BN, BM, BK, STEPS, SPLITS, GROUPS, HELD, X_LEFT, PDL, EVEN_K, UPCAST,
    )  # fmt: skip
    if last:
        m_M = tl.arange(0, BM)
        n_1N = n_N[None, :]
        inside = (m_M < M)[:, None] & (n_1N < N)
        at = m_M[:, None] * N + n_1N
        if gate_ptr is not None:
            acc *= tl.load(gate_ptr + n_1N, mask=n_1N < N, other=0.0).to(tl.float32)
        kind = sum_ptr.dtype.element_ty
        x = tl.where(inside, acc + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        rounded = x.to(kind)
        tl.store(sum_ptr + at, rounded, mask=inside)
        scale = 1.0 + tl.load(scale_ptr + n_1N, mask=n_1N < N, other=0.0).to(tl.float32)
        tl.store(xs_ptr + at, (rounded.to(tl.float32) * scale).to(kind), mask=inside)
        GROUP_COUNT: tl.constexpr = BN // SQUARES
        squares_MG = tl.sum(tl.reshape(x * x, (BM, GROUP_COUNT, SQUARES)), axis=2)
        group_1G = (tl.program_id(0) * GROUP_COUNT + tl.arange(0, GROUP_COUNT))[None, :]
        inside = (m_M < M)[:, None] & (group_1G * SQUARES < N)
        tl.store(squares_ptr + group_1G * M + m_M[:, None], squares_MG, mask=inside)


@triton_op("pi0exp::stream_residual", mutates_args=("counters",))
def stream_residual(
    h_BTK: Tensor,
    weight_DK: Tensor,
    x_BTD: Tensor,
    gate_D: Tensor | None,
    scale_D: Tensor,
    counters: Tensor,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' and xs, [B, T, D] of x's dtype, and squares, float32 [P, B T].

    h: [B, T, K]; weight: [D, K]; x: [B, T, D], all of one dtype. gate: [D] or None; scale: [D]; any floating dtype.
    counters: as in `skinny_gemm`. ahead: as in `stream`.
    At most 64 rows. Raises ValueError.
    """
    h_MK = rows_of(h_BTK, weight_DK)
    (B, T, _), (D, _) = h_BTK.shape, weight_DK.shape
    fits = x_BTD.shape == (B, T, D) and x_BTD.dtype is h_BTK.dtype and x_BTD.is_contiguous()
    require(fits, f"x is {x_BTD.dtype} {list(x_BTD.shape)}: not {h_BTK.dtype} [{B}, {T}, {D}], contiguous")
    check_vector("gate", gate_D, D)
    check_vector("scale", scale_D, D)
    launch = product_launch("stream_residual", B * T, weight_DK)
    tiles = triton.cdiv(D, launch.BN)
    sum_BTD, xs_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
    require(launch.BN % SQUARES == 0, f"a tile of {launch.BN} columns is no multiple of {SQUARES}")
    squares_PM = x_BTD.new_empty((triton.cdiv(D, SQUARES), B * T), dtype=torch.float32)
    launch_stream(
        stream_residual_kernel, launch, h_MK, weight_DK, counters, ahead, tiles, launch.BN,
        residual_ptr=x_BTD, gate_ptr=gate_D, scale_ptr=scale_D, sum_ptr=sum_BTD, xs_ptr=xs_BTD, squares_ptr=squares_PM,
        N=D, SQUARES=SQUARES,
    )  # fmt: skip
    return sum_BTD, xs_BTD, squares_PM


# ---- cases


def _arguments(
    generator: torch.Generator, device: torch.device, shape: tuple[int, ...], gated: bool, dtype: torch.dtype
) -> tuple[Any, ...]:
    B, T, D, K = shape
    return (
        random(generator, device, B, T, K, dtype=dtype),
        random(generator, device, D, K, dtype=dtype) * K**-0.5,
        random(generator, device, B, T, D, dtype=dtype),
        random(generator, device, D, dtype=torch.float32) if gated else None,
        random(generator, device, D, dtype=torch.float32),
        counters_on(device),
    )


def _case(
    name: str, B: int, T: int, D: int, K: int, *, gated: bool = False, dtype: torch.dtype = torch.bfloat16,
    small: bool = False, pi0: bool = False,
) -> Case:  # fmt: skip
    moved = float((D * K + B * T * (K + 3 * D)) * dtype.itemsize)
    make = partial(_arguments, shape=(B, T, D, K), gated=gated, dtype=dtype)
    return Case(name, make, 2.0 * B * T * D * K, moved, pi0=pi0, small=small, terms=K)


def _ahead(name: str, launch: Any, rows: int, K: int, **constants: Any) -> Any:
    types = dict.fromkeys(("residual_ptr", "sum_ptr", "xs_ptr"), "*bf16:16") | {"N": "i32:16"}
    types |= dict.fromkeys(("gate_ptr", "scale_ptr", "squares_ptr"), "*fp32:16")
    return compiled_stream(name, stream_residual_kernel, launch, rows, K, types, SQUARES=SQUARES, **constants)


KERNELS = (
    Kernel(
        "stream_residual",
        stream_residual,
        stream_residual_reference,
        cases=(
            *(
                _case(f"{name}, {T} rows", 1, T, 1024, K, gated=gated, pi0=True)
                for T, gated in ((11, False), (10, False), (51, False), (50, True))
                for name, K in (("out", 2048), ("down", 4096))
            ),
            _case("small", 1, 3, 32, 96, small=True),
            _case("small, odd sizes, gate", 2, 3, 45, 37, gated=True, small=True),
            _case("small, float32", 2, 2, 45, 37, gated=True, dtype=torch.float32, small=True),
        ),
        ahead_of_time=(
            _ahead("any GPU", OTHERS, 11, 2048, gate_ptr=None),
            _ahead("held and split, gate", Launch(32, 128, SPLITS=8, HELD=True), 50, 4096),
            *(
                _ahead(f"{rows} rows from {K}, dependent launch",
                    START["sm_90"][f"stream_residual {padded} 1024x{K}"], rows, K, gate_ptr=None, PDL=True)
                for rows, padded in ((10, 16), (50, 64))
                for K in (2048, 4096)
            ),
        ),
    ),
)  # fmt: skip
