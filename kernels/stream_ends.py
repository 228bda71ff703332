"""Both ends of a denoising step: tokens become the residual stream, and the stream becomes a velocity.

    stream_begin   x = tokens, xs = x * (1 + scale), squares[0, m] = sum of x[m, :]^2, as `stream_residual` leaves them
    stream_end     velocity = (xs / rms + shift) w^T + bias, of the last C tokens; the final norm and the output matrix

The norm's scheme, and the axes' letters, stand in `stream`; A columns of the velocity, C tokens that are actions.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import FLOATS, AheadOfTime, Case, Kernel, launchable, random, require, wide
from pi0exp.kernels.stream import check_squares, check_vector, inverse_rms_reference, positive
from pi0exp.kernels.stream_residual import squares_reference

BEGIN = {"num_warps": 4}
END = {"BA": 8, "num_warps": 4}
"""Columns of the velocity a program. Both are begun with, not tuned: a step has 2 of these launches and 90 others."""


def stream_begin_reference(tokens_BTD: Tensor, scale_D: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maths above: x and xs of the dtype of `like`, squares."""
    x_BTD = tokens_BTD.to(like.dtype)
    xs_BTD = (x_BTD.to(wide(x_BTD, scale_D)) * (1.0 + scale_D)).to(like.dtype)
    return x_BTD, xs_BTD, squares_reference(tokens_BTD, tokens_BTD.shape[-1])


def stream_end_reference(
    xs_BTD: Tensor, squares_PM: Tensor, shift_D: Tensor | None, weight_AD: Tensor, bias_A: Tensor, last: int, eps: float
) -> Tensor:
    """The maths above: [B, last, A] of the weight's dtype. The plain model rounds the normed row; this does not."""
    B, T, D = xs_BTD.shape
    y_BTD = xs_BTD.to(wide(xs_BTD, shift_D)) * inverse_rms_reference(squares_PM, D, eps, B, T, 1)
    y_BTD = y_BTD if shift_D is None else y_BTD + shift_D
    return F.linear(y_BTD[:, T - last :].to(weight_AD.dtype), weight_AD, bias_A)


@triton.jit
def stream_begin_kernel(
    tokens_ptr, scale_ptr, x_ptr, xs_ptr, squares_ptr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A row. Grid (M,)."""
    wait_for_front(PDL)
    d = tl.arange(0, BLOCK)
    at = tl.program_id(0) * D + d
    kind = x_ptr.dtype.element_ty
    token = tl.load(tokens_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    x = token.to(kind)
    scale = 1.0 + tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x, mask=d < D)
    tl.store(xs_ptr + at, (x.to(tl.float32) * scale).to(kind), mask=d < D)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(token * token, axis=0))


@triton.jit
def stream_end_kernel(
    xs_ptr, squares_ptr, shift_ptr, weight_ptr, bias_ptr, y_ptr, M, T, last, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr, BA: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BA columns of a row of the velocity. Grid (B last, A / BA)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.arange(0, BLOCK)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    inside = (a < A)[:, None] & (d < D)[None, :]
    w = tl.load(weight_ptr + a[:, None] * D + d[None, :], mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) // last) * T + T - last + tl.program_id(0) % last
    t = tl.arange(0, PADDED)
    squares = tl.sum(tl.load(squares_ptr + t * M + row, mask=t < TILES, other=0.0), axis=0)
    xs = tl.load(xs_ptr + row * D + d, mask=d < D, other=0.0)
    y = xs.to(tl.float32) * tl.rsqrt(squares / D + tl.cast(eps, tl.float32))
    if shift_ptr is not None:
        y += tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    out = tl.sum(w.to(tl.float32) * y[None, :], axis=1) + tl.load(bias_ptr + a, mask=a < A, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0) * A + a, out.to(y_ptr.dtype.element_ty), mask=a < A)


@triton_op("pi0exp::stream_begin", mutates_args=())
def stream_begin(tokens_BTD: Tensor, scale_D: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and xs, [B, T, D] of the dtype of `like`, and squares, float32 [1, B T].

    tokens: bfloat16, float16 or float32, contiguous; scale: [D], any of these. Raises ValueError.
    """
    require(tokens_BTD.ndim == 3 and tokens_BTD.is_contiguous(), "tokens are not [B, T, D], contiguous")
    dtype = like.dtype
    require(tokens_BTD.dtype in FLOATS and dtype in FLOATS, f"{tokens_BTD.dtype} or {dtype} is none of {FLOATS}")
    B, T, D = tokens_BTD.shape
    check_vector("scale", scale_D, D)
    x_BTD, xs_BTD = (tokens_BTD.new_empty(tokens_BTD.shape, dtype=dtype) for _ in range(2))
    squares_PM = tokens_BTD.new_empty((1, B * T), dtype=torch.float32)
    launchable(stream_begin_kernel)[(B * T,)](
        tokens_BTD, scale_D, x_BTD, xs_BTD, squares_PM, D=D, BLOCK=triton.next_power_of_2(D), **BEGIN,
        **launch_behind(dependent(tokens_BTD)),
    )  # fmt: skip
    return x_BTD, xs_BTD, squares_PM


@triton_op("pi0exp::stream_end", mutates_args=())
def stream_end(
    xs_BTD: Tensor, squares_PM: Tensor, shift_D: Tensor | None, weight_AD: Tensor, bias_A: Tensor, last: int, eps: float
) -> Tensor:
    """The velocity of the last `last` tokens: [B, last, A] of the weight's dtype.

    xs: [B, T, D], contiguous, and squares: float32 [P, B T], of `stream_residual`. shift: [D] or None. weight: [A, D];
    bias: [A]; any floating dtype. Raises ValueError.
    """
    require(xs_BTD.ndim == 3 and xs_BTD.is_contiguous(), "xs is not [B, T, D], contiguous")
    B, T, D = xs_BTD.shape
    A = weight_AD.shape[0]
    check_squares(squares_PM, B * T)
    check_vector("shift", shift_D, D)
    check_vector("bias", bias_A, A)
    require(weight_AD.shape == (A, D) and weight_AD.is_contiguous(), f"weight is not [{A}, {D}], contiguous")
    require(0 < last <= T, f"the last {last} of {T} tokens")
    y_BCA = weight_AD.new_empty((B, last, A))
    launchable(stream_end_kernel)[(B * last, triton.cdiv(A, END["BA"]))](
        xs_BTD, squares_PM, shift_D, weight_AD, bias_A, y_BCA, B * T, T, last, eps, D=D,
        BLOCK=triton.next_power_of_2(D), A=A, TILES=squares_PM.shape[0],
        PADDED=triton.next_power_of_2(squares_PM.shape[0]), **END, **launch_behind(dependent(xs_BTD)),
    )  # fmt: skip
    return y_BCA


# ---- cases


def _begin(
    generator: torch.Generator, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Any, ...]:
    tokens_BTD = random(generator, device, *shape, dtype=torch.float32)
    return (
        tokens_BTD,
        random(generator, device, shape[-1], dtype=torch.float32),
        torch.ones(1, dtype=dtype, device=device),
    )


def _end(
    generator: torch.Generator, device: torch.device, shape: tuple[int, ...], tiles: int, last: int, shift: bool,
    dtype: torch.dtype, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    B, T, D, A = shape
    return (
        random(generator, device, B, T, D, dtype=dtype),
        positive(generator, device, tiles, B * T, D),
        random(generator, device, D, dtype=torch.float32) if shift else None,
        random(generator, device, A, D, dtype=torch.float32) * D**-0.5,
        random(generator, device, A, dtype=torch.float32),
        last,
        eps,
    )


def _begin_case(
    name: str, B: int, T: int, D: int, dtype: torch.dtype = torch.bfloat16, *, pi0: bool = True, small: bool = False
) -> Case:
    moved = B * T * D * (4.0 + 2 * dtype.itemsize)
    make = partial(_begin, shape=(B, T, D), dtype=dtype)
    return Case(name, make, bytes_moved=moved, pi0=pi0, small=small, terms=D)


def _end_case(
    name: str, B: int, T: int, D: int, A: int, *, last: int, tiles: int, shift: bool = False,
    dtype: torch.dtype = torch.bfloat16, pi0: bool = True, small: bool = False,
) -> Case:  # fmt: skip
    make = partial(
        _end, shape=(B, T, D, A), tiles=tiles, last=last, shift=shift, dtype=dtype, eps=1e-6 if pi0 else 0.5
    )  # fmt: skip
    moved = float(B * last * D * dtype.itemsize + A * D * 4 + B * last * A * 4)
    return Case(name, make, 2.0 * B * last * D * A, moved, pi0=pi0, small=small, terms=D)


_FP32 = ("scale_ptr", "squares_ptr", "shift_ptr", "weight_ptr", "bias_ptr", "tokens_ptr")
_TYPES = dict.fromkeys(_FP32, "*fp32:16") | dict.fromkeys(("x_ptr", "xs_ptr"), "*bf16:16")


def _ahead(kernel: Any, own: dict[str, str], **constants: Any) -> AheadOfTime:
    names = set(kernel.arg_names) - set(constants)
    types = {argument: kind for argument, kind in (_TYPES | own).items() if argument in names}
    return AheadOfTime("a step", kernel, types, {"D": 1024, "BLOCK": 1024, **constants})


_END_FIXED = {"A": 32, "BA": END["BA"], "TILES": 64, "PADDED": 64}
_END_TYPES = {"y_ptr": "*fp32:16", "M": "i32", "T": "i32", "last": "i32", "eps": "fp32"}

KERNELS = (
    Kernel(
        "stream_begin",
        stream_begin,
        stream_begin_reference,
        cases=(
            _begin_case("denoise 11 x 1024", 1, 11, 1024),
            _begin_case("denoise 50 x 1024", 1, 50, 1024),
            _begin_case("small", 2, 3, 45, pi0=False, small=True),
            _begin_case("small, float32", 1, 2, 32, torch.float32, pi0=False, small=True),
        ),
        ahead_of_time=also_dependent(_ahead(stream_begin_kernel, {})),
    ),
    Kernel(
        "stream_end",
        stream_end,
        stream_end_reference,
        cases=(
            _end_case("10 actions of 11 rows", 1, 11, 1024, 32, last=10, tiles=64),
            _end_case("50 actions", 1, 50, 1024, 32, last=50, tiles=64, shift=True),
            _end_case("small", 2, 3, 45, 5, last=2, tiles=3, shift=True, pi0=False, small=True),
            _end_case("small, float32", 1, 2, 32, 9, last=2, tiles=1, dtype=torch.float32, pi0=False, small=True),
        ),
        ahead_of_time=also_dependent(_ahead(stream_end_kernel, dict(_END_TYPES), **_END_FIXED)),
    ),
)
