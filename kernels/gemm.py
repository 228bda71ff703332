"""Matrix products of many rows, with what follows them: bias, activation, gated activation, residual.

The maths, the reference and the shapes' letters stand in `gemm_epilogue`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.gemm_cases import case, cublas, small_cases
from pi0exp.kernels.gemm_epilogue import arch_of, checked, finish, read, reference
from pi0exp.kernels.kernel import INTERPRETED, AheadOfTime, Kernel, launchable


@triton.jit
def tile_gemm_kernel(
    x_ptr, weight_ptr, y_ptr, bias_ptr, residual_ptr, scale_ptr, M, N, K, stride_m, rows_per_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of y. Programs next to each other share GROUP rows of tiles, so that the L2 serves them."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    m_M = (group * GROUP + within % height) * BM + tl.arange(0, BM)
    n_N = (within // height) * BN + tl.arange(0, BN)
    k_K = tl.arange(0, BK)
    # Rows past the end read row 0 again: no mask in the loop, and `finish` stores none of them.
    x_MK = x_ptr + tl.where(m_M < M, m_M, 0)[:, None] * stride_m + k_K[None, :]
    w_KN = weight_ptr + tl.where(n_N < N, n_N, 0)[None, :] * K + k_K[:, None]
    h_MN = tl.zeros((BM, BN), tl.float32)
    up_MN = h_MN
    for k in range(0, K, BK):
        x = read(x_MK + k, k_K[None, :], K - k, EVEN_K)
        w = read(w_KN + k, k_K[:, None], K - k, EVEN_K)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        h_MN = tl.dot(x, w, h_MN, input_precision="ieee")
        if GATED:
            w = read(w_KN + N * K + k, k_K[:, None], K - k, EVEN_K)
            if UPCAST:
                w = w.to(tl.float32)
            up_MN = tl.dot(x, w, up_MN, input_precision="ieee")
    finish(
        h_MN, up_MN, m_M, n_N, y_ptr, bias_ptr, residual_ptr, scale_ptr, M, N, rows_per_scale, ACTIVATION, GATED
    )  # fmt: skip


# ---- launch


@dataclass(frozen=True)
class Launch:
    """Tile sizes, tiles in a group of rows, warps and pipeline stages of one launch."""

    BM: int
    BN: int
    BK: int
    GROUP: int = 8
    num_warps: int = 8
    num_stages: int = 3

    def constants(self) -> dict[str, int]:
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK, "GROUP": self.GROUP}


# Two accumulators of it, as a gated program has, just fit into the registers; 128 x 256 spills with a residual sum.
LARGE = Launch(128, 128, 64)
# Outputs of few large tiles: the 768 x 1152 of SigLIP are 54 of 128 x 128, and an H200 has 132 multiprocessors.
SMALL = Launch(64, 64, 64, num_warps=4, num_stages=4)
ENOUGH_TILES = 264
# 64 KiB of LDS on gfx942.
AMD = {False: Launch(128, 128, 32, num_stages=2), True: Launch(64, 64, 32, num_warps=4, num_stages=2)}
# Without tensor cores.
FLOAT32 = Launch(32, 32, 32, num_warps=4, num_stages=2)

LAUNCH: dict[tuple[str, int, int], Launch] = {
    ("sm_90", 3456, 1152): Launch(64, 128, 64, num_warps=4, num_stages=4),
    ("sm_90", 1152, 1152): Launch(64, 64, 64, num_warps=4, num_stages=4),
    ("sm_90", 4304, 1152): Launch(128, 128, 64, num_stages=4),
    ("sm_90", 1152, 4304): Launch(64, 128, 64, num_warps=4, num_stages=4),
    ("sm_90", 2560, 2048): Launch(64, 128, 64, num_warps=4, num_stages=4),
    ("sm_90", 2048, 2048): Launch(64, 128, 64, num_warps=4, num_stages=4),
    ("sm_90", 32768, 2048): Launch(128, 128, 64, num_stages=4),
    ("sm_90", 2048, 16384): Launch(128, 128, 64, num_stages=4),
}
"""(architecture, rows of the weight, K) -> what is launched there; rows are 512 to 968 in Pi0.

The best of five tiles each on an H200 (torch 2.11, Triton 3.6, 2026-11-24)."""


def launch_for(arch: str, dtype: torch.dtype, M: int, C: int, K: int, gated: bool) -> Launch:
    """The launch for M rows and a weight [C, K]: the table's, or by the number of large tiles."""
    if dtype is torch.float32:
        return FLOAT32
    if chosen := LAUNCH.get((arch, C, K)):
        return chosen
    if arch.startswith("gfx"):
        return AMD[gated]
    tiles = triton.cdiv(M, LARGE.BM) * triton.cdiv(C // 2 if gated else C, LARGE.BN)
    return LARGE if tiles >= ENOUGH_TILES else SMALL


# ---- the op


@triton_op("pi0exp::gemm", mutates_args=())
def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """As `reference`. bfloat16, float16 or float32 (multiplied in full, not as TF32); last axis of x contiguous, the
    others of x in one stride or copied; everything else contiguous. Raises ValueError."""
    x_MK, M, N, rows_per_scale = checked(x, weight, bias, residual, scale, activation, gated)
    C, K = weight.shape
    launch = launch_for(arch_of(x.device), x.dtype, M, C, K, gated)
    y = x.new_empty((*x.shape[:-1], N))
    launchable(tile_gemm_kernel)[(triton.cdiv(M, launch.BM) * triton.cdiv(N, launch.BN),)](
        x_MK, weight, y, bias, residual, scale, M, N, K, x_MK.stride(0), rows_per_scale,
        **launch.constants(), ACTIVATION=activation, GATED=gated, EVEN_K=K % launch.BK == 0, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def ahead_of_time(name: str, launch: Launch, **constants: Any) -> AheadOfTime:
    names = ("x_ptr", "weight_ptr", "y_ptr", "bias_ptr", "residual_ptr", "scale_ptr")
    pointers = dict.fromkeys(names, "*bf16:16")
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16", "stride_m": "i32:16", "rows_per_scale": "i32"}
    fixed = launch.constants() | {"ACTIVATION": "none", "GATED": False, "EVEN_K": True, "UPCAST": False} | constants
    types = {argument: kind for argument, kind in (pointers | sizes).items() if argument not in fixed}
    return AheadOfTime(name, tile_gemm_kernel, types, fixed, launch.num_warps, launch.num_stages, dots=True)


NOTHING = {"bias_ptr": None, "residual_ptr": None, "scale_ptr": None}
KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "gemm",
        gemm,
        reference,
        cases=(
            *(
                one
                for M in (768, 512)
                for one in (
                    case(f"vision qkv, {M} rows", M, 3456, 1152, bias=True),
                    case(f"vision out, {M} rows", M, 1152, 1152, bias=True, residual=True),
                    case(f"vision fc1, {M} rows", M, 4304, 1152, bias=True, activation="gelu_tanh"),
                    case(f"vision fc2, {M} rows", M, 1152, 4304, bias=True, residual=True),
                )
            ),
            case("prefill qkv", 788, 2560, 2048),
            case("prefill out", 788, 2048, 2048, residual=True),
            case("prefill gate_up", 788, 16384, 2048, gated=True, activation="gelu_tanh"),
            case("prefill down", 788, 2048, 16384, residual=True),
            *small_cases(70),
        ),
        ahead_of_time=(
            ahead_of_time("plain", AMD[False], **NOTHING),
            ahead_of_time("bias + gelu, ragged K", SMALL, residual_ptr=None, scale_ptr=None,
                ACTIVATION="gelu_tanh", EVEN_K=False),
            ahead_of_time("gated gelu", AMD[True], **NOTHING, ACTIVATION="gelu_tanh", GATED=True),
            ahead_of_time("bias + residual + scale", AMD[False]),
        ),
        libraries={"cublas": cublas},
    ),
)  # fmt: skip
