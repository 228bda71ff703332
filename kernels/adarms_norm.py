"""Pi0.5's adaptive RMSNorm, alone or with the gated residual sum in front of it.

x' = x + branch * gate, y = x' / sqrt(mean(x'^2) + eps) * (1 + scale) + shift; scale, shift and gate hold for all tokens
of a batch row, or of all of them. Statistics in float32, taken from x' as it is rounded and kept. One launch reads x
and the branch once and writes x' and y once.

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
    "narrow": {"ROWS": 1, "num_warps": 8},  # up to 1024 wide: all rows at once on the GPU
    "wide": {"ROWS": 1, "num_warps": 8},
    "many": {"ROWS": 2, "num_warps": 4},
}
"""Chosen on an H200 (Triton 3.6, 2026-11-24); neighbours differ by a few percent."""
MANY_ROWS = 8192
EPS = 1e-6
"""The model's. Cases that are tests only take a large one, so that its loss would show."""


def adarms_norm_reference(x_BTD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + scale) + shift."""
    wide_BTD = x_BTD.to(wide(x_BTD, scale_B1D, shift_B1D))
    normed_BTD = wide_BTD * torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + eps)
    return (normed_BTD * (1.0 + scale_B1D) + shift_B1D).to(x_BTD.dtype)


def add_adarms_norm_reference(
    x_BTD: Tensor, branch_BTD: Tensor, gate_B1D: Tensor | None, scale_B1D: Tensor, shift_B1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum x + branch * gate (a gate of None is one), rounded once, and its norm."""
    dtype = wide(x_BTD)
    gated_BTD = branch_BTD.to(dtype) if gate_B1D is None else branch_BTD.to(dtype) * gate_B1D
    sum_BTD = (x_BTD.to(dtype) + gated_BTD).to(x_BTD.dtype)
    return sum_BTD, adarms_norm_reference(sum_BTD, scale_B1D, shift_B1D, eps)


@triton.jit
def adarms_norm_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    y_ptr,
    T,
    x_B,
    x_T,
    branch_B,
    branch_T,
    gate_B,
    scale_B,
    shift_B,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / ROWS, B). Pointers of branch and sum are None where there is no branch; the gate's where it is one."""
    wait_for_front(PDL)
    b = tl.program_id(1).to(tl.int64)
    t_R1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d_1D = tl.arange(0, BLOCK)[None, :]
    inside, column = (t_R1 < T) & (d_1D < D), d_1D < D
    x_RD = tl.load(x_ptr + b * x_B + t_R1 * x_T + d_1D, mask=inside, other=0.0).to(tl.float32)
    scale_1D = 1.0 + tl.load(scale_ptr + b * scale_B + d_1D, mask=column, other=0.0).to(tl.float32)
    shift_1D = tl.load(shift_ptr + b * shift_B + d_1D, mask=column, other=0.0).to(tl.float32)
    out_RD = (b * T + t_R1) * D + d_1D
    if branch_ptr is not None:
        branch_RD = tl.load(branch_ptr + b * branch_B + t_R1 * branch_T + d_1D, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            branch_RD *= tl.load(gate_ptr + b * gate_B + d_1D, mask=column, other=0.0).to(tl.float32)
        rounded_RD = (x_RD + branch_RD).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_RD, rounded_RD, mask=inside)
        x_RD = rounded_RD.to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / D + eps)
    y_RD = x_RD * rstd_R[:, None] * scale_1D + shift_1D
    tl.store(y_ptr + out_RD, y_RD.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_B1D: Tensor | None,
    scale_B1D: Tensor,
    shift_B1D: Tensor,
    eps: float,
    sum_BTD: Tensor | None,
    y_BTD: Tensor,
) -> None:
    require(x_BTD.ndim == 3, f"x is {tuple(x_BTD.shape)}: not [B, T, D]")
    require(branch_BTD is None or (branch_BTD.shape, branch_BTD.dtype) == (x_BTD.shape, x_BTD.dtype), "branch unlike x")
    B, T, D = x_BTD.shape
    for name, m in (("gate", gate_B1D), ("scale", scale_B1D), ("shift", shift_B1D)):
        fits = m is None or (m.shape in ((B, 1, D), (1, 1, D)) and m.stride(-1) == 1)
        require(fits, f"{name} is {None if m is None else tuple(m.shape)}: not [{B} or 1, 1, {D}] with adjacent values")
    x_BTD, branch_BTD = as_rows(x_BTD), None if branch_BTD is None else as_rows(branch_BTD)
    shape = LAUNCH["many" if B * T >= MANY_ROWS else "wide" if D > 1024 else "narrow"]
    launchable(adarms_norm_kernel)[(triton.cdiv(T, shape["ROWS"]), B)](
        x_BTD,
        branch_BTD,
        gate_B1D,
        scale_B1D,
        shift_B1D,
        sum_BTD,
        y_BTD,
        T,
        x_BTD.stride(0),
        x_BTD.stride(1),
        0 if branch_BTD is None else branch_BTD.stride(0),
        0 if branch_BTD is None else branch_BTD.stride(1),
        *(0 if m is None or m.shape[0] == 1 else m.stride(0) for m in (gate_B1D, scale_B1D, shift_B1D)),
        eps,
        D=D,
        BLOCK=triton.next_power_of_2(D),
        **shape,
        **launch_behind(dependent(x_BTD)),
    )


@torch.library.triton_op("pi0exp::adarms_norm", mutates_args={})
def adarms_norm(x_BTD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + scale) + shift.

    x: bfloat16, float16 or float32, values of a row adjacent; scale, shift: [B or 1, 1, D], any of these dtypes.
    Returns x's shape and dtype, contiguous. Raises ValueError where they do not fit.
    """
    y_BTD = torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=x_BTD.device)
    _launch(x_BTD, None, None, scale_B1D, shift_B1D, eps, None, y_BTD)
    return y_BTD


@torch.library.triton_op("pi0exp::add_adarms_norm", mutates_args={})
def add_adarms_norm(
    x_BTD: Tensor, branch_BTD: Tensor, gate_B1D: Tensor | None, scale_B1D: Tensor, shift_B1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + branch * gate, its adarms_norm). branch: like x, strides of its own; gate: [B or 1, 1, D], None for one."""
    sum_BTD, y_BTD = (torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=x_BTD.device) for _ in range(2))
    _launch(x_BTD, branch_BTD, gate_B1D, scale_B1D, shift_B1D, eps, sum_BTD, y_BTD)
    return sum_BTD, y_BTD


def _arguments(
    generator: torch.Generator,
    device: torch.device,
    shape: tuple[int, int, int],
    modulations: int,
    dtype: torch.dtype,
    spare: int,
    add: bool,
    gated: bool,
    eps: float,
) -> tuple[Any, ...]:
    """Modulations are views of one tensor, as the model makes them; `spare` columns behind a row are not the row's."""
    B, T, D = shape
    x_BTD, branch_BTD = (random(generator, device, B, T, D + spare, dtype=dtype)[..., :D] for _ in range(2))
    scale, shift, gate = random(generator, device, modulations, 1, 3 * D, dtype=torch.float32).chunk(3, dim=-1)
    branch = (branch_BTD, gate.to(dtype) if gated else None) if add else ()
    return x_BTD, *branch, scale, shift, eps


def _case(
    name: str,
    B: int,
    T: int,
    D: int,
    *,
    add: bool,
    modulations: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    spare: int = 0,
    gated: bool = True,
    pi0: bool,
    small: bool,
) -> Case:
    once = modulations * D * (8 + (dtype.itemsize if add and gated else 0))
    moved = (4 if add else 2) * B * T * D * dtype.itemsize + once
    make = partial(
        _arguments,
        shape=(B, T, D),
        modulations=modulations,
        dtype=dtype,
        spare=spare,
        add=add,
        gated=gated,
        eps=EPS if pi0 else 0.5,
    )
    return Case(name, make, bytes_moved=moved, pi0=pi0, small=small)


def _cases(add: bool) -> tuple[Case, ...]:
    real = partial(_case, add=add, pi0=True, small=False)
    tiny = partial(_case, add=add, pi0=False, small=True)
    odd = partial(_case, add=add, pi0=False, small=False)
    return (
        real("denoise 10 x 1024", 1, 10, 1024),
        real("denoise 50 x 1024", 1, 50, 1024),
        real("above L2 64 x 788 x 1024", 64, 788, 1024, modulations=64),
        tiny("2 x 3 x 64 float32", 2, 3, 64, modulations=2, dtype=torch.float32),
        tiny("2 x 3 x 67, one modulation, strided rows", 2, 3, 67, spare=5),
        tiny("2 x 2 x 33, no gate", 2, 2, 33, modulations=2, gated=False),
        odd("3 x 3001 x 1001, strided rows", 3, 3001, 1001, modulations=3, spare=3),
        odd("3 x 111 x 2048 float32", 3, 111, 2048, modulations=3, dtype=torch.float32),
    )


def _ahead(name: str, add: bool, launch: str) -> AheadOfTime:
    shape = {key: value for key, value in LAUNCH[launch].items() if key != "num_warps"}
    pointers = dict.fromkeys(("x_ptr", "branch_ptr", "gate_ptr", "sum_ptr", "y_ptr"), "*bf16:16")
    modulations = dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32:16")
    strides = dict.fromkeys(("x_B", "x_T", "branch_B", "branch_T", "gate_B", "scale_B", "shift_B"), "i32:16")
    return AheadOfTime(
        name,
        adarms_norm_kernel,
        pointers | modulations | strides | {"T": "i32", "eps": "fp32"},
        {"D": 1024, "BLOCK": 1024, **shape} | ({} if add else {"branch_ptr": None, "gate_ptr": None, "sum_ptr": None}),
        num_warps=LAUNCH[launch]["num_warps"],
    )


KERNELS = (
    Kernel(
        "adarms_norm",
        adarms_norm,
        adarms_norm_reference,
        _cases(add=False),
        also_dependent(_ahead("denoise", False, "narrow")),
    ),
    Kernel(
        "add_adarms_norm",
        add_adarms_norm,
        add_adarms_norm_reference,
        _cases(add=True),
        also_dependent(_ahead("denoise", True, "narrow"), _ahead("above L2", True, "many")),
    ),
)
