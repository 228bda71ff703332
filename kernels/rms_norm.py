"""Gemma's RMSNorm, alone or with the residual sum in front of it.

x' = x + branch, y = x' / sqrt(mean(x'^2) + eps) * (1 + weight); statistics in float32, taken from x' as it is rounded
and kept. One launch reads x and the branch once and writes x' and y once.

Shapes: B batch, T tokens, D width, R rows of a program.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import AheadOfTime, Case, Kernel, as_rows, launchable, random, require, wide

LAUNCH: dict[str, dict[str, int]] = {
    "narrow": {"ROWS": 1, "num_warps": 4},  # up to 1024 wide: 16 bytes a thread, all rows at once on the GPU
    "wide": {"ROWS": 1, "num_warps": 8},
    "many": {"ROWS": 1, "num_warps": 4},
}
"""Chosen on an H200 (Triton 3.6, 2026-11-24); neighbours differ by a few percent."""
MANY_ROWS = 8192
EPS = 1e-6
"""The model's. Cases that are tests only take a large one, so that its loss would show."""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) over the last axis."""
    x_wide = x.to(wide(x, weight))
    normed = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + branch and its norm."""
    x_sum = x + branch
    return x_sum, rms_norm_reference(x_sum, weight, eps)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    T,
    x_B,
    x_T,
    branch_B,
    branch_T,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / ROWS, B). The pointers of branch and sum are None where there is no branch."""
    wait_for_front(PDL)
    b = tl.program_id(1).to(tl.int64)
    t_R1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d_1D = tl.arange(0, BLOCK)[None, :]
    inside = (t_R1 < T) & (d_1D < D)
    x_RD = tl.load(x_ptr + b * x_B + t_R1 * x_T + d_1D, mask=inside, other=0.0).to(tl.float32)
    scale_1D = 1.0 + tl.load(weight_ptr + d_1D, mask=d_1D < D, other=0.0).to(tl.float32)
    out_RD = (b * T + t_R1) * D + d_1D
    if branch_ptr is not None:
        branch_RD = tl.load(branch_ptr + b * branch_B + t_R1 * branch_T + d_1D, mask=inside, other=0.0)
        rounded_RD = (x_RD + branch_RD.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_RD, rounded_RD, mask=inside)
        x_RD = rounded_RD.to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / D + eps)
    y_RD = x_RD * rstd_R[:, None] * scale_1D
    tl.store(y_ptr + out_RD, y_RD.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, x_sum: Tensor | None, y: Tensor) -> None:
    require(weight.shape == x.shape[-1:] and weight.is_contiguous(), f"weight {tuple(weight.shape)}: not [D] in a row")
    require(branch is None or (branch.shape, branch.dtype) == (x.shape, x.dtype), "branch is not like x")
    x_BTD, branch_BTD = as_rows(x), None if branch is None else as_rows(branch)
    B, T, D = x_BTD.shape
    shape = LAUNCH["many" if B * T >= MANY_ROWS else "wide" if D > 1024 else "narrow"]
    launchable(rms_norm_kernel)[(triton.cdiv(T, shape["ROWS"]), B)](
        x_BTD,
        branch_BTD,
        weight,
        x_sum,
        y,
        T,
        x_BTD.stride(0),
        x_BTD.stride(1),
        0 if branch_BTD is None else branch_BTD.stride(0),
        0 if branch_BTD is None else branch_BTD.stride(1),
        eps,
        D=D,
        BLOCK=triton.next_power_of_2(D),
        **shape,
        **launch_behind(dependent(x_BTD)),
    )


@torch.library.triton_op("pi0exp::rms_norm", mutates_args={})
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight).

    x: [..., D], bfloat16, float16 or float32, values of a row adjacent; weight: [D], any of them. Returns x's shape and
    dtype, contiguous. Raises ValueError where they do not fit.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, None, y)
    return y


@torch.library.triton_op("pi0exp::add_rms_norm", mutates_args={})
def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + branch, its rms_norm). branch: shape and dtype of x, strides of its own. Both results are contiguous."""
    x_sum, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, branch, weight, eps, x_sum, y)
    return x_sum, y


def _arguments(
    generator: torch.Generator,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    spare: int,
    add: bool,
    eps: float,
) -> tuple[Any, ...]:
    """`spare`: columns behind every row that do not belong to it."""
    D = shape[-1]
    rows = [random(generator, device, *shape[:-1], D + spare, dtype=dtype)[..., :D] for _ in range(1 + add)]
    return *rows, random(generator, device, D, dtype=torch.float32), eps


def _case(
    name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, spare: int = 0, add: bool, pi0: bool, small: bool
) -> Case:
    moved = (4 if add else 2) * torch.Size(shape).numel() * dtype.itemsize + 4 * shape[-1]
    make = partial(_arguments, shape=shape, dtype=dtype, spare=spare, add=add, eps=EPS if pi0 else 0.5)
    return Case(name, make, bytes_moved=moved, pi0=pi0, small=small)


def _cases(add: bool) -> tuple[Case, ...]:
    real = partial(_case, add=add, pi0=True, small=False)
    tiny = partial(_case, add=add, pi0=False, small=True)
    odd = partial(_case, add=add, pi0=False, small=False)
    return (
        real("denoise 11 x 1024", 1, 11, 1024),
        real("denoise 51 x 1024", 1, 51, 1024),
        real("prefill 788 x 2048", 1, 788, 2048),
        real("above L2 50432 x 2048", 64, 788, 2048),
        tiny("3 x 64 float32", 3, 64, dtype=torch.float32),
        tiny("2 x 3 x 67, strided rows", 2, 3, 67, spare=5),
        tiny("2 x 2 x 2 x 33 float16", 2, 2, 2, 33, dtype=torch.float16),
        tiny("one row of 17", 17),
        odd("2 x 5003 x 1001, strided rows", 2, 5003, 1001, spare=3),
        odd("333 x 1024 float32", 333, 1024, dtype=torch.float32),
    )


def _ahead(name: str, add: bool, D: int, launch: str) -> AheadOfTime:
    shape = {key: value for key, value in LAUNCH[launch].items() if key != "num_warps"}
    pointers = dict.fromkeys(("x_ptr", "branch_ptr", "sum_ptr", "y_ptr"), "*bf16:16") | {"weight_ptr": "*fp32:16"}
    strides = dict.fromkeys(("x_B", "x_T", "branch_B", "branch_T"), "i32:16")
    return AheadOfTime(
        name,
        rms_norm_kernel,
        pointers | strides | {"T": "i32", "eps": "fp32"},
        {"D": D, "BLOCK": D, **shape} | ({} if add else {"branch_ptr": None, "sum_ptr": None}),
        num_warps=LAUNCH[launch]["num_warps"],
    )


KERNELS = (
    Kernel(
        "rms_norm",
        rms_norm,
        rms_norm_reference,
        _cases(add=False),
        also_dependent(_ahead("prefill", False, 2048, "wide")),
    ),
    Kernel(
        "add_rms_norm",
        add_rms_norm,
        add_rms_norm_reference,
        _cases(add=True),
        also_dependent(_ahead("denoise", True, 1024, "narrow"), _ahead("above L2", True, 2048, "many")),
    ),
)
