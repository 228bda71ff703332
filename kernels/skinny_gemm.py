"""Matrix products of at most 64 rows, bound by reading the weight once: the denoising steps of Pi0.

The maths stands in `gemm_epilogue`. Such products run in long dependent chains, so the time that counts is
the chain's, and most of it is starting: a kernel of 2 us reads 8 MB and waits as long for its predecessor. Hence

* programmatic dependent launch (sm_90): a program tells at once that the next kernel may start, and waits only before
  it touches what an earlier kernel made; `held` launches read their part of the weight before that;
* the weight on the left of the product, its rows as the rows of the matrix instruction, so that 11 rows of x waste 5
  columns of 16 and not 53 rows of 64;
* K split where N alone does not occupy the GPU: between warps (`GROUPS`, each sums its own part of K), and between
  programs (`SPLITS`), whose last one to arrive adds the parts in the order of K. Both are bitwise repeatable.

A weight must have been complete before the kernel in front of this one began; weights of a model are. Everything else
may come from the kernel in front.

Shapes: M rows, K width in, N width out, R rows of a tile of the weight (BN, or 2 BN if gated), P parts of K.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.ahead import ask
from pi0exp.kernels.dependent import dependent, launch_behind
from pi0exp.kernels.gemm_cases import case, chain, counted, skinny_cublas, skinny_reference, small_cases
from pi0exp.kernels.gemm_epilogue import arch_of, checked, finish, read
from pi0exp.kernels.kernel import INTERPRETED, AheadOfTime, Kernel, launchable, require

MAX_ROWS = 64
COUNTERS = 2048
"""Tiles of N that a launch may have: 8 columns each of the widest weight, 16384 columns of y."""


@triton.jit
def multiply(w, x, acc, GROUPS: tl.constexpr, X_LEFT: tl.constexpr, UPCAST: tl.constexpr):
    """acc + w x^T; with GROUPS, group by group; with X_LEFT the transpose of that."""
    if UPCAST:
        w, x = w.to(tl.float32), x.to(tl.float32)
    if GROUPS > 1:
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    elif X_LEFT:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def summed(
    x_ptr, weight_ptr, parts_ptr, counters_ptr, ahead_ptr, ahead_pieces, row_R, M, K, stride_m,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, X_LEFT: tl.constexpr, PDL: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x w^T of all rows of x and the rows `row_R` of the weight: [BM, R], and whether this program has it.

    Grid (tiles of the weight, SPLITS): a program sums STEPS chunks of GROUPS x BK of K, and the one that is through
    last adds what the others of its tile have left, in the order of K. ahead: see `ahead`; None for nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    part = tl.program_id(1)
    CHUNK: tl.constexpr = GROUPS * BK
    m_M = tl.arange(0, BM)
    read_M = tl.where(m_M < M, m_M, 0)
    if GROUPS > 1:
        k = (tl.arange(0, GROUPS) * BK)[:, None, None] + tl.arange(0, BK)[None, None, :]
        w_at = row_R[None, :, None] * K + k
        x_at = read_M[None, :, None] * stride_m + k
        acc = tl.zeros((GROUPS, R, BM), tl.float32)
    else:
        k = tl.arange(0, BK)[None, :]
        w_at = row_R[:, None] * K + k
        x_at = read_M[:, None] * stride_m + k
        acc = tl.zeros((BM, R) if X_LEFT else (R, BM), tl.float32)
    begin = part * STEPS * CHUNK
    if HELD:
        held = ()  # type: Any
        for step in tl.static_range(STEPS):
            at = begin + step * CHUNK
            # Not unpacked, as the linter would have it: Triton's language has no such expression.
            held = held + (read(weight_ptr + at + w_at, k, K - at, EVEN_K),)  # noqa: RUF005
        if ahead_ptr is not None:
            ask(ahead_ptr, ahead_pieces)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for step in tl.static_range(STEPS):
            at = begin + step * CHUNK
            acc = multiply(held[step], read(x_ptr + at + x_at, k, K - at, EVEN_K), acc, GROUPS, X_LEFT, UPCAST)
    else:
        if ahead_ptr is not None:
            ask(ahead_ptr, ahead_pieces)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for step in range(STEPS):
            at = begin + step * CHUNK
            w = read(weight_ptr + at + w_at, k, K - at, EVEN_K)
            acc = multiply(w, read(x_ptr + at + x_at, k, K - at, EVEN_K), acc, GROUPS, X_LEFT, UPCAST)
    if GROUPS > 1:
        acc = tl.sum(acc, axis=0)
    if not X_LEFT:
        acc = tl.trans(acc)
    last = True
    if SPLITS > 1:
        SIZE: tl.constexpr = BM * R
        cell_MR = m_M[:, None] * R + tl.arange(0, R)[None, :]
        parts = parts_ptr + tile * SPLITS * SIZE
        tl.store(parts + part * SIZE + cell_MR, acc)
        # One thread counts for all, so all must have stored; acq_rel then publishes their parts and shows the others'.
        tl.debug_barrier()
        last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counters_ptr + tile, 0)
            acc = tl.zeros((BM, R), tl.float32)
            for one in tl.static_range(SPLITS):
                # .cg: from the L2, where other multiprocessors' stores are.
                acc += tl.load(parts + one * SIZE + cell_MR, cache_modifier=".cg")
    return acc, last


@triton.jit
def halves(acc, BM: tl.constexpr, HALF: tl.constexpr):
    """The first HALF columns of [BM, 2 HALF] and the others."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))


@triton.jit
def skinny_gemm_kernel(
    x_ptr, weight_ptr, y_ptr, bias_ptr, residual_ptr, scale_ptr, parts_ptr, counters_ptr,
    M, N, K, stride_m, rows_per_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, X_LEFT: tl.constexpr, PDL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BN columns of y, or one of SPLITS parts of their sum."""
    R: tl.constexpr = 2 * BN if GATED else BN
    first = tl.program_id(0) * BN
    r_R = tl.arange(0, R)
    n_R = first + r_R % BN
    # Rows past the end read row 0 again: no mask here, and `finish` stores none of them.
    row_R = tl.where(n_R < N, n_R, 0) + (r_R // BN) * N
    acc, last = summed(
        x_ptr, weight_ptr, parts_ptr, counters_ptr, None, 0, row_R, M, K, stride_m,
        R, BM, BK, STEPS, SPLITS, GROUPS, HELD, X_LEFT, PDL, EVEN_K, UPCAST,
    )  # fmt: skip
    if last:
        m_M = tl.arange(0, BM)
        n_N = first + tl.arange(0, BN)
        if GATED:
            h_MN, up_MN = halves(acc, BM, BN)
            finish(
                h_MN, up_MN, m_M, n_N, y_ptr, bias_ptr, residual_ptr, scale_ptr, M, N, rows_per_scale, ACTIVATION, True
            )  # fmt: skip
        else:
            finish(
                acc, acc, m_M, n_N, y_ptr, bias_ptr, residual_ptr, scale_ptr, M, N, rows_per_scale, ACTIVATION, False
            )  # fmt: skip


# ---- launch


@dataclass(frozen=True)
class Launch:
    """How one shape is launched.

    BN columns of y a program; BK of K a step and group; GROUPS of warps and SPLITS of programs that share K; HELD: the
    weight is read before waiting, all steps at once; X_LEFT: x on the left of the product (not with GROUPS).
    """

    BN: int
    BK: int
    GROUPS: int = 1
    SPLITS: int = 1
    HELD: bool = False
    X_LEFT: bool = False
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = True

    def constants(self, K: int) -> dict[str, Any]:
        """The constexprs of the kernel that follow from this and the width in."""
        return {
            "BN": self.BN, "BK": self.BK, "STEPS": triton.cdiv(K, self.SPLITS * self.GROUPS * self.BK),
            "SPLITS": self.SPLITS, "GROUPS": self.GROUPS, "HELD": self.HELD, "X_LEFT": self.X_LEFT,
            "EVEN_K": K % (self.SPLITS * self.GROUPS * self.BK) == 0,
        }  # fmt: skip


LAUNCH: dict[tuple[str, int, int, int], Launch] = {
    ("sm_90", 16, 2560, 1024): Launch(32, 256, SPLITS=2, HELD=True, X_LEFT=True, num_warps=2),
    ("sm_90", 16, 1024, 2048): Launch(64, 256, SPLITS=4, HELD=True),
    ("sm_90", 16, 8192, 1024): Launch(32, 256, SPLITS=2, HELD=True),
    ("sm_90", 16, 1024, 4096): Launch(64, 256, SPLITS=8, HELD=True, X_LEFT=True, num_warps=8),
    ("sm_90", 64, 2560, 1024): Launch(16, 128, X_LEFT=True, num_stages=6),
    ("sm_90", 64, 1024, 2048): Launch(16, 256, SPLITS=2, X_LEFT=True, num_stages=4),
    ("sm_90", 64, 8192, 1024): Launch(32, 128, num_stages=6),
    ("sm_90", 64, 1024, 4096): Launch(64, 128, SPLITS=8, num_stages=4),
}
"""(architecture, rows padded to 16, 32 or 64, rows of the weight, K) -> what is launched there.

The best of 453 candidates in a chain of 720 dependent products on an H200 (torch 2.11, Triton 3.6, 2026-11-24)."""
OTHERS = Launch(32, 64, num_warps=4)
FLOAT32 = Launch(16, 32, num_warps=4)


def check_counters(counters: Tensor, needed: int = 0) -> None:
    """Raises ValueError for other counters than all of them, and for more tiles than there are."""
    good = counters.dtype is torch.int32 and counters.shape == (COUNTERS,)
    require(good, f"counters are {counters.dtype} {list(counters.shape)}; wanted torch.int32 [{COUNTERS}]")
    require(needed <= COUNTERS, f"{needed} tiles; there are {COUNTERS} counters")


def padded(M: int) -> int:
    """Rows of the tile of x: 16, 32 or 64."""
    return 16 if M <= 16 else 32 if M <= 32 else 64


def launch_for(arch: str, dtype: torch.dtype, M: int, C: int, K: int) -> Launch:
    """The launch for M rows and a weight [C, K]; shapes between 16 and 64 rows without a row of their own take 64's."""
    if dtype is torch.float32:
        return FLOAT32
    return LAUNCH.get((arch, padded(M), C, K)) or LAUNCH.get((arch, 64 if M > 16 else 16, C, K)) or OTHERS


@triton_op("pi0exp::skinny_gemm", mutates_args=("counters",))
def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    counters: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """As `gemm`, for at most 64 rows.

    counters: int32 [COUNTERS] on x's device, zeros, left as zeros. Calls that may run at the same time (on two streams)
    must not share it. Raises ValueError.
    """
    x_MK, M, N, rows_per_scale = checked(x, weight, bias, residual, scale, activation, gated)
    require(M <= MAX_ROWS, f"x has {M} rows; skinny_gemm takes at most {MAX_ROWS}")
    check_counters(counters)
    return launched(
        launch_for(arch_of(x.device), x.dtype, M, *weight.shape), x_MK, weight, counters,
        x.new_empty((*x.shape[:-1], N)), bias, residual, scale, rows_per_scale, activation, gated,
    )  # fmt: skip


def launched(
    launch: Launch, x_MK: Tensor, weight: Tensor, counters: Tensor, y: Tensor, bias: Tensor | None,
    residual: Tensor | None, scale: Tensor | None, rows_per_scale: int, activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """Run `launch` on checked arguments, into y."""
    M, K = x_MK.shape
    N, BM = y.shape[-1], padded(M)
    tiles = triton.cdiv(N, launch.BN)
    pdl = dependent(x_MK, launch.pdl)
    parts = counters
    if launch.SPLITS > 1:
        R = 2 * launch.BN if gated else launch.BN
        parts = x_MK.new_empty((tiles, launch.SPLITS, BM, R), dtype=torch.float32)
    launchable(skinny_gemm_kernel)[(tiles, launch.SPLITS)](
        x_MK, weight, y, bias, residual, scale, parts, counters, M, N, K, x_MK.stride(0), rows_per_scale,
        BM=BM, **launch.constants(K), ACTIVATION=activation, GATED=gated, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **launch_behind(pdl),
    )  # fmt: skip
    return y


def ahead_of_time(name: str, launch: Launch, C: int, K: int, rows: int, **constants: Any) -> AheadOfTime:
    pointers = ("x_ptr", "weight_ptr", "y_ptr", "bias_ptr", "residual_ptr", "scale_ptr")
    types = dict.fromkeys(pointers, "*bf16:16") | {"parts_ptr": "*fp32:16", "counters_ptr": "*i32:16"}
    types |= {"M": "i32", "N": "i32:16", "K": "i32:16", "stride_m": "i32:16", "rows_per_scale": "i32"}
    fixed: dict[str, Any] = {"ACTIVATION": "none", "GATED": False, "UPCAST": False, "PDL": False}
    fixed |= {"bias_ptr": None, "scale_ptr": None} | launch.constants(K) | {"BM": rows} | constants
    kinds = {argument: kind for argument, kind in types.items() if argument not in fixed}
    return AheadOfTime(name, skinny_gemm_kernel, kinds, fixed, launch.num_warps, launch.num_stages, dots=True)


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "skinny_gemm",
        skinny_gemm,
        skinny_reference,
        cases=tuple(
            counted(one, COUNTERS)
            for one in (
                *(one for M in (11, 10, 51, 50) for one in chain(M)),
                # Not timed: float32 stays with BLAS, which is 25 times as fast without matrix instructions.
                case("pi05 modulation, float32", 1, 3072, 1024, bias=True, dtype=torch.float32, pi0=False),
                case("64 rows", 64, 1024, 2048, residual=True, scale_rows=2, pi0=False),
                *small_cases(10),
            )
        ),
        ahead_of_time=(
            ahead_of_time("any shape, ragged K", OTHERS, 1000, 1000, 32, residual_ptr=None, EVEN_K=False),
            ahead_of_time("groups, held", Launch(16, 128, GROUPS=8, HELD=True, num_warps=8), 2560, 1024, 16),
            ahead_of_time("splits, x on the left", Launch(32, 64, SPLITS=4, X_LEFT=True, num_stages=2), 1024, 2048, 64),
            ahead_of_time("gated gelu", Launch(16, 64, GROUPS=4, num_stages=2), 8192, 1024, 16, residual_ptr=None,
                ACTIVATION="gelu_tanh", GATED=True),
        ),
        libraries={"cublas": skinny_cublas},
    ),
)  # fmt: skip
