"""The gated activation of Gemma's MLP: act(gate) * up, in float32 inside and rounded once.

gelu_tanh(g) = g * (1 + tanh(a)) / 2 with a = sqrt(2 / pi) * (g + 0.044715 g^3); since (1 + tanh(a)) / 2 = 1 / (1 +
exp(-2a)), both kinds are g / (1 + exp(-z)), with z = 2a for gelu_tanh and z = g for silu. Gate and up may be the halves
of the rows of one product.

Shapes: B batch, T tokens, F mlp width, C values of a program.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import AheadOfTime, Case, Kernel, as_rows, launchable, random, require, wide

LAUNCH: dict[str, dict[str, int]] = {
    "few": {"BLOCK": 512, "num_warps": 4},  # the 11 rows of a denoising step on 88 programs
    "many": {"BLOCK": 1024, "num_warps": 4},
}
"""Chosen on an H200 (Triton 3.6, 2026-11-24); neighbours differ by a few percent."""
MANY_VALUES = 2**21
KINDS = ("gelu_tanh", "silu")
_TWICE_SQRT_2_OVER_PI = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))


def gated_activation_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """gelu_tanh(gate) * up, or silu(gate) * up."""
    g, u = (x.to(wide(gate, up)) for x in (gate, up))
    return ((F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh")) * u).to(gate.dtype)


@triton.jit
def gated_activation_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    T,
    gate_B,
    gate_T,
    up_B,
    up_T,
    F: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T * F / BLOCK, B), the programs of a row side by side."""
    wait_for_front(PDL)
    chunks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    b, t = tl.program_id(1).to(tl.int64), (tl.program_id(0) // chunks).to(tl.int64)
    f_C = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    gate_C = tl.load(gate_ptr + b * gate_B + t * gate_T + f_C, mask=f_C < F, other=0.0).to(tl.float32)
    up_C = tl.load(up_ptr + b * up_B + t * up_T + f_C, mask=f_C < F, other=0.0).to(tl.float32)
    z_C = gate_C if SILU else _TWICE_SQRT_2_OVER_PI * (gate_C + 0.044715 * gate_C * gate_C * gate_C)
    product_C = gate_C / (1.0 + tl.exp(-z_C)) * up_C
    tl.store(out_ptr + (b * T + t) * F + f_C, product_C.to(out_ptr.dtype.element_ty), mask=f_C < F)


@torch.library.triton_op("pi0exp::gated_activation", mutates_args={})
def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, where act is `kind`: "gelu_tanh" or "silu".

    gate, up: [..., F] of one dtype, bfloat16, float16 or float32, values of a row adjacent, strides of their own.
    Returns their shape and dtype, contiguous. Raises ValueError where they do not fit or the kind is unknown.
    """
    require(kind in KINDS, f"kind {kind!r}: choose one of {', '.join(KINDS)}")
    require((gate.shape, gate.dtype) == (up.shape, up.dtype), "gate and up differ in shape or dtype")
    gate_BTF, up_BTF = as_rows(gate), as_rows(up)
    B, T, width = gate_BTF.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    shape = LAUNCH["many" if B * T * width >= MANY_VALUES else "few"]
    launchable(gated_activation_kernel)[(T * triton.cdiv(width, shape["BLOCK"]), B)](
        gate_BTF,
        up_BTF,
        out,
        T,
        gate_BTF.stride(0),
        gate_BTF.stride(1),
        up_BTF.stride(0),
        up_BTF.stride(1),
        F=width,
        SILU=kind == "silu",
        **shape,
        **launch_behind(dependent(gate_BTF)),
    )
    return out


def _arguments(
    generator: torch.Generator,
    device: torch.device,
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    fused: bool,
    scale: float,
) -> tuple[Any, ...]:
    """`fused`: gate and up are the halves of one tensor's rows. `scale`: of the gate's values."""
    both = random(generator, device, *shape[:-1], 2 * shape[-1], dtype=dtype) * scale
    gate, up = both.chunk(2, dim=-1)
    return (gate, up, kind) if fused else (gate.contiguous(), up.contiguous(), kind)


def _case(
    name: str,
    *shape: int,
    kind: str = "gelu_tanh",
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = True,
    scale: float = 1.0,
    pi0: bool = False,
    small: bool = False,
) -> Case:
    make = partial(_arguments, shape=shape, kind=kind, dtype=dtype, fused=fused, scale=scale)
    return Case(name, make, bytes_moved=3 * torch.Size(shape).numel() * dtype.itemsize, pi0=pi0, small=small)


def _ahead(name: str, F: int, kind: str, launch: str) -> AheadOfTime:
    strides = dict.fromkeys(("gate_B", "gate_T", "up_B", "up_T"), "i32:16")
    return AheadOfTime(
        name,
        gated_activation_kernel,
        dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16:16") | strides | {"T": "i32"},
        {"F": F, "SILU": kind == "silu", "BLOCK": LAUNCH[launch]["BLOCK"]},
        num_warps=LAUNCH[launch]["num_warps"],
    )


KERNELS = (
    Kernel(
        "gated_activation",
        gated_activation,
        gated_activation_reference,
        (
            _case("denoise 11 x 4096, halves of one", 1, 11, 4096, pi0=True),
            _case("denoise 51 x 4096, halves of one", 1, 51, 4096, pi0=True),
            _case("prefill 788 x 16384", 1, 788, 16384, fused=False, pi0=True),
            _case("prefill 788 x 16384, halves of one", 1, 788, 16384, pi0=True),
            _case("above L2 6304 x 16384, halves of one", 8, 788, 16384, pi0=True),
            _case("3 x 64 float32", 3, 64, dtype=torch.float32, small=True),
            _case("3 x 64 silu float32", 3, 64, kind="silu", dtype=torch.float32, small=True),
            _case("2 x 3 x 67", 2, 3, 67, small=True),
            _case(
                "2 x 3 x 67 silu float16, halves apart",
                2,
                3,
                67,
                kind="silu",
                dtype=torch.float16,
                fused=False,
                small=True,
            ),
            # Beyond |g| = 6 the tanh is one; exp overflows at 88.
            _case("2 x 129 float32, gates to 100", 2, 129, dtype=torch.float32, scale=30.0, small=True),
            _case("2 x 129 silu, gates to 300", 2, 129, kind="silu", scale=100.0, small=True),
            _case("301 x 4099 silu", 301, 4099, kind="silu"),
            _case("2 x 700 x 4304 float32", 2, 700, 4304, dtype=torch.float32, fused=False),
        ),
        also_dependent(
            _ahead("denoise", 4096, "gelu_tanh", "few"),
            _ahead("prefill", 16384, "gelu_tanh", "many"),
            _ahead("silu", 4096, "silu", "few"),
        ),
    ),
)
