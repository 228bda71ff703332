"""Noisy actions become tokens where the time's share is known before: two launches in front of a step's layers.

    hidden = silu(x w_in^T + bias_in + time)      w_in: the first two matrices on the actions, folded to one
    tokens = hidden w_out^T + bias_out

For Pi0.5, whose tokens know no time, one: tokens = x w_in^T + bias_in.

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

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind
from pi0exp.kernels.kernel import AheadOfTime, Case, Kernel, launchable, random, require
from pi0exp.kernels.stream import check_vector

ROWS = 4
"""Rows of a program: as many of x as registers hold beside the weight."""
FIRST, SECOND = {"BN": 32, "num_warps": 4}, {"BN": 8, "num_warps": 4}
"""Columns of a program of either launch. Begun with, not tuned."""


def stream_embed_reference(
    x_BCA: Tensor, in_DA: Tensor, in_bias_D: Tensor,
    time_D: Tensor | None = None, out_DD: Tensor | None = None, out_bias_D: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The maths above."""
    if time_D is None or out_DD is None:
        return F.linear(x_BCA, in_DA, in_bias_D)
    return F.linear(F.silu(F.linear(x_BCA, in_DA, in_bias_D) + time_D), out_DD, out_bias_D)


@triton.jit
def stream_embed_kernel(
    x_ptr, weight_ptr, bias_ptr, time_ptr, y_ptr, M, N,
    K: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of ROWS rows: x w^T + bias or, with a time, silu(x w^T + bias + time). Grid (N / BN, M / ROWS)."""
    k = tl.arange(0, BLOCK)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    more = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if time_ptr is not None:
        more += tl.load(time_ptr + n, mask=n < N, other=0.0)
    if PDL:
        # In this order: what starts behind a step's first launch finds the prefill ended, and may read its keys.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
    x_BCA: Tensor, in_DA: Tensor, in_bias_D: Tensor,
    time_D: Tensor | None = None, out_DD: Tensor | None = None, out_bias_D: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Tokens [B, C, D]. All float32 and contiguous; x: [B, C, A], in: [D, A], out: [D, D], the others [D].

    The last three are there together, or not at all. Raises ValueError.
    """
    D, A = in_DA.shape
    require(x_BCA.ndim == 3 and x_BCA.shape[2] == A, f"actions are {list(x_BCA.shape)}: not [B, C, {A}]")
    second = [tensor is not None for tensor in (time_D, out_DD, out_bias_D)]
    require(all(second) or not any(second), "time, second matrix and second bias are there together, or not at all")
    for name, tensor in (("actions", x_BCA), ("the first matrix", in_DA), ("the second matrix", out_DD)):
        if tensor is not None:
            good = tensor.dtype == torch.float32 and tensor.is_contiguous()
            require(good, f"{name}: {tensor.dtype}, or not contiguous; wanted torch.float32")
    for name, vector in (("first bias", in_bias_D), ("time", time_D), ("second bias", out_bias_D)):
        if vector is not None:
            check_vector(name, vector, D)
            require(vector.dtype == torch.float32, f"{name} is {vector.dtype}; wanted torch.float32")
    M = x_BCA.shape[0] * x_BCA.shape[1]
    tokens_BCD = x_BCA.new_empty((*x_BCA.shape[:2], D))
    launches = [(x_BCA, in_DA, in_bias_D, time_D, tokens_BCD, FIRST)]
    if out_DD is not None and out_bias_D is not None:
        require(out_DD.shape == (D, D), f"the second matrix is {list(out_DD.shape)}: not [{D}, {D}]")
        hidden_BCD = torch.empty_like(tokens_BCD)
        launches = [
            (x_BCA, in_DA, in_bias_D, time_D, hidden_BCD, FIRST),
            (hidden_BCD, out_DD, out_bias_D, None, tokens_BCD, SECOND),
        ]
    behind = launch_behind(dependent(x_BCA))
    for x, weight, bias, time, y, how in launches:
        K = weight.shape[1]
        launchable(stream_embed_kernel)[(triton.cdiv(D, how["BN"]), triton.cdiv(M, ROWS))](
            x, weight, bias, time, y, M, D, K=K, BLOCK=triton.next_power_of_2(K), ROWS=ROWS, **how, **behind,
        )  # fmt: skip
    return tokens_BCD


# ---- cases


def _make(
    generator: torch.Generator, device: torch.device, B: int, C: int, A: int, D: int, timed: bool
) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return random(generator, device, *shape, dtype=torch.float32)

    first = normal(B, C, A), normal(D, A) * A**-0.5, normal(D)
    return (*first, normal(D), normal(D, D) * D**-0.5, normal(D)) if timed else first


def _case(
    name: str, B: int, C: int, A: int, D: int, *, timed: bool = True, pi0: bool = True, small: bool = False
) -> Case:
    moved = 4.0 * (D * A + B * C * (A + D) + D + (D * D + 2 * B * C * D + 2 * D if timed else 0))
    flops = 2.0 * B * C * D * (A + (D if timed else 0))
    make = partial(_make, B=B, C=C, A=A, D=D, timed=timed)
    return Case(name, make, flops, moved, pi0=pi0, small=small, terms=D if timed else A)


_TYPES = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "time_ptr", "y_ptr"), "*fp32:16") | {"M": "i32", "N": "i32"}


def _ahead(name: str, K: int, how: dict[str, int], timed: bool) -> AheadOfTime:
    types = {argument: kind for argument, kind in _TYPES.items() if timed or argument != "time_ptr"}
    constants = {"K": K, "BLOCK": K, "BN": how["BN"], "ROWS": ROWS} | ({} if timed else {"time_ptr": None})
    return AheadOfTime(name, stream_embed_kernel, types, constants, how["num_warps"])


KERNELS = (
    Kernel(
        "stream_embed",
        stream_embed,
        stream_embed_reference,
        cases=(
            _case("10 actions", 1, 10, 32, 1024),
            _case("50 actions", 1, 50, 32, 1024),
            _case("50 actions of Pi0.5", 1, 50, 32, 1024, timed=False),
            _case("small", 2, 3, 5, 45, pi0=False, small=True),
            _case("small, no time", 2, 3, 5, 45, timed=False, pi0=False, small=True),
            _case("small, one row", 1, 1, 16, 64, pi0=False, small=True),
        ),
        ahead_of_time=also_dependent(
            _ahead("first", 32, FIRST, timed=True),
            _ahead("second", 1024, SECOND, timed=False),
            _ahead("only", 32, FIRST, timed=False),
        ),
    ),
)
