"""Noisy actions become tokens where the time's share is known before: two launches in front of a step's layers.

    hidden = silu(x w_in^T + bias_in + time)      w_in: the first two matrices on the actions, folded to one
    tokens = hidden w_out^T + bias_out

All of it float32, as the model has it outside of its transformers. There are few rows and the larger weight has 4 MB:
what counts is to read it once, while the launch in front still runs (`skinny_gemm` says more of dependent launches).
Without matrix instructions, whose float32 is none. A program has the whole of K of its columns, so no sum is split
between programs, and equal inputs give equal bits.

Shapes: M rows, A width of an action, D width of a token; of one launch K width in, N width out.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.ahead import dependent
from pi0exp.kernels.kernel import AheadOfTime, Case, Kernel, launchable, random, require
from pi0exp.kernels.stream import check_vector

ROWS = 4
"""Rows of a program: as many of x as registers hold beside the weight."""
FIRST, SECOND = {"BN": 32, "num_warps": 4}, {"BN": 8, "num_warps": 4}
"""Columns of a program of either launch. Begun with, not tuned."""


def stream_embed_reference(
    x_BCA: Tensor, in_DA: Tensor, in_bias_D: Tensor, time_D: Tensor, out_DD: Tensor, out_bias_D: Tensor
) -> Tensor:
    """The maths above."""
    return F.linear(F.silu(F.linear(x_BCA, in_DA, in_bias_D) + time_D), out_DD, out_bias_D)


@triton.jit
def stream_embed_kernel(
    x_ptr, weight_ptr, bias_ptr, time_ptr, y_ptr, M, N,
    K: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of ROWS rows: x w^T + bias or, with a time, silu(x w^T + bias + time). Grid (N / BN, M / ROWS)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BLOCK)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    more = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if time_ptr is not None:
        more += tl.load(time_ptr + n, mask=n < N, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = tl.program_id(1) * ROWS
    rows = ()  # type: Any
    for i in tl.static_range(ROWS):  # all of them under way before the first is needed
        # Not unpacked, as the linter would have it: Triton's language has no such expression.
        there = k < tl.where(first + i < M, K, 0)
        rows = rows + (tl.load(x_ptr + (first + i) * K + k, mask=there, other=0.0),)  # noqa: RUF005
    for i in tl.static_range(ROWS):
        y = tl.sum(w * rows[i][None, :], axis=1) + more
        if time_ptr is not None:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + (first + i) * N + n, y, mask=n < tl.where(first + i < M, N, 0))


@triton_op("pi0exp::stream_embed", mutates_args=())
def stream_embed(
    x_BCA: Tensor, in_DA: Tensor, in_bias_D: Tensor, time_D: Tensor, out_DD: Tensor, out_bias_D: Tensor
) -> Tensor:
    """Tokens [B, C, D]. All float32 and contiguous; x: [B, C, A], in: [D, A], out: [D, D], the others [D].

    Raises ValueError.
    """
    D, A = in_DA.shape
    require(x_BCA.ndim == 3 and x_BCA.shape[2] == A, f"actions are {list(x_BCA.shape)}: not [B, C, {A}]")
    require(out_DD.shape == (D, D), f"the second matrix is {list(out_DD.shape)}: not [{D}, {D}]")
    for name, tensor in (("actions", x_BCA), ("the first matrix", in_DA), ("the second matrix", out_DD)):
        good = tensor.dtype == torch.float32 and tensor.is_contiguous()
        require(good, f"{name}: {tensor.dtype}, or not contiguous; wanted torch.float32")
    for name, vector in (("first bias", in_bias_D), ("time", time_D), ("second bias", out_bias_D)):
        check_vector(name, vector, D)
        require(vector.dtype == torch.float32, f"{name} is {vector.dtype}; wanted torch.float32")
    M = x_BCA.shape[0] * x_BCA.shape[1]
    hidden_BCD, tokens_BCD = (x_BCA.new_empty((*x_BCA.shape[:2], D)) for _ in range(2))
    pdl = dependent(x_BCA, True)
    for x, weight, bias, time, y, how in (
        (x_BCA, in_DA, in_bias_D, time_D, hidden_BCD, FIRST),
        (hidden_BCD, out_DD, out_bias_D, None, tokens_BCD, SECOND),
    ):
        K = weight.shape[1]
        launchable(stream_embed_kernel)[(triton.cdiv(D, how["BN"]), triton.cdiv(M, ROWS))](
            x, weight, bias, time, y, M, D, K=K, BLOCK=triton.next_power_of_2(K), ROWS=ROWS, PDL=pdl, **how,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return tokens_BCD


# ---- cases


def _make(generator: torch.Generator, device: torch.device, B: int, C: int, A: int, D: int) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return random(generator, device, *shape, dtype=torch.float32)

    return normal(B, C, A), normal(D, A) * A**-0.5, normal(D), normal(D), normal(D, D) * D**-0.5, normal(D)


def _case(name: str, B: int, C: int, A: int, D: int, *, pi0: bool = True, small: bool = False) -> Case:
    moved = 4.0 * (D * (A + D) + B * C * (A + 3 * D) + 3 * D)
    flops = 2.0 * B * C * D * (A + D)
    return Case(name, partial(_make, B=B, C=C, A=A, D=D), flops, moved, pi0=pi0, small=small, terms=D)


_TYPES = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "time_ptr", "y_ptr"), "*fp32:16") | {"M": "i32", "N": "i32"}


def _ahead(name: str, K: int, how: dict[str, int], pdl: bool) -> AheadOfTime:
    timed = how is FIRST
    types = {argument: kind for argument, kind in _TYPES.items() if timed or argument != "time_ptr"}
    constants = {"K": K, "BLOCK": K, "BN": how["BN"], "ROWS": ROWS, "PDL": pdl} | ({} if timed else {"time_ptr": None})
    targets = ("sm_90",) if pdl else ("gfx942", "gfx950", "sm_90")
    return AheadOfTime(name, stream_embed_kernel, types, constants, how["num_warps"], targets=targets)


KERNELS = (
    Kernel(
        "stream_embed",
        stream_embed,
        stream_embed_reference,
        cases=(
            _case("10 actions", 1, 10, 32, 1024),
            _case("50 actions", 1, 50, 32, 1024),
            _case("small", 2, 3, 5, 45, pi0=False, small=True),
            _case("small, one row", 1, 1, 16, 64, pi0=False, small=True),
        ),
        ahead_of_time=tuple(
            _ahead(f"{which}, {name}", K, how, pdl)
            for which, K, how in (("first", 32, FIRST), ("second", 1024, SECOND))
            for name, pdl in (("any GPU", False), ("dependent", True))
        ),
    ),
)
