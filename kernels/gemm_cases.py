"""The products of Pi0 at which the matrix kernels are tested and timed, and PyTorch's BLAS library beside them.

The axes' letters are those of `gemm_epilogue`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0exp.kernels.gemm_epilogue import reference
from pi0exp.kernels.kernel import Case, random


def case(
    name: str, M: int, N: int, K: int, *, bias: bool = False, residual: bool = False, scale_rows: int = 0,
    activation: str = "none", gated: bool = False, dtype: torch.dtype = torch.bfloat16, batch: int | None = None,
    pi0: bool = True, small: bool = False,
) -> Case:  # fmt: skip
    """A case with outputs of order one. scale_rows: G, 0 for no scale. batch: x is [batch, M / batch, K]."""
    C, leading = (2 * N if gated else N), (M,) if batch is None else (batch, M // batch)

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return random(generator, device, *shape, dtype=dtype)

        weight = normal(C, K) * K**-0.5
        return (
            normal(*leading, K),
            weight,
            normal(C) if bias else None,
            normal(*leading, N) if residual else None,
            normal(scale_rows, N) if scale_rows else None,
            activation,
            gated,
        )

    values = M * K + C * K + M * N + bias * C + residual * M * N + scale_rows * N
    size = torch.empty((), dtype=dtype).element_size()
    return Case(name, make, 2.0 * M * C * K, float(values * size), pi0, small, terms=K)


def small_cases(M: int, **more: Any) -> tuple[Case, ...]:
    """Every epilogue at sizes that no tile divides, quick under the interpreter."""
    common = {"pi0": False, "small": True, **more}
    return (
        case("plain, odd sizes", M, 37, 45, **common),
        case("plain, float32", M, 37, 45, dtype=torch.float32, **common),
        case("plain, float16", M, 37, 45, dtype=torch.float16, **common),
        case("bias + gelu", M, 40, 32, bias=True, activation="gelu_tanh", **common),
        case("bias + silu, float32", M, 40, 32, bias=True, activation="silu", dtype=torch.float32, **common),
        case("gated gelu", M, 24, 48, gated=True, activation="gelu_tanh", **common),
        case("gated silu + bias, float32", M, 24, 48, gated=True, bias=True, activation="silu", dtype=torch.float32,
            **common),
        case("residual", M, 40, 64, residual=True, **common),
        case("bias + residual, batch, scale each, float32", M, 40, 64, bias=True, residual=True, scale_rows=2, batch=2,
            dtype=torch.float32, **common),
        case("residual, one scale", M, 40, 64, residual=True, scale_rows=1, **common),
    )  # fmt: skip


def cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None,
    activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """The same from PyTorch's BLAS library, an operation each: the product with its bias, then what follows it."""
    h = F.linear(x, weight, bias)
    up = None
    if gated:
        h, up = h.chunk(2, dim=-1)
    if activation != "none":
        h = F.gelu(h, approximate="tanh") if activation == "gelu_tanh" else F.silu(h)
    h = h if up is None else h * up
    if scale is not None:
        h = (h.reshape(scale.shape[0], -1, h.shape[-1]) * scale[:, None]).reshape(h.shape)
    return h if residual is None else residual + h


# ---- products of few rows


def chain(M: int) -> tuple[Case, ...]:
    """The products of a layer of Pi0's action expert."""
    return (
        case(f"qkv, {M} rows", M, 2560, 1024),
        case(f"out, {M} rows", M, 1024, 2048, residual=True),
        case(f"gate_up, {M} rows", M, 4096, 1024, gated=True, activation="gelu_tanh"),
        case(f"down, {M} rows", M, 1024, 4096, residual=True),
    )


def counted(case: Case, counters: int) -> Case:
    """The case with counters; as no argument may be changed, they must be zeros again afterwards."""

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, weight, *others = case.make(generator, device)
        return (x, weight, torch.zeros(counters, dtype=torch.int32, device=device), *others)

    return replace(case, make=make)


def skinny_reference(
    x: Tensor,
    weight: Tensor,
    counters: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """The reference; counters are read by nobody and stay zeros."""
    return reference(x, weight, bias, residual, scale, activation, gated)


def skinny_cublas(
    x: Tensor, weight: Tensor, counters: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None,
    activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    return cublas(x, weight, bias, residual, scale, activation, gated)
