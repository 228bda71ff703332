"""Matrix products whose tiles are too few for the GPU: each program has the same share of all steps of K (stream-K).

    z = x w^T + bias;  h = f(z);  y = h, or residual + h        as in `gemm_epilogue`, without gate and scale

SigLIP's products have 54 to 204 tiles of 128 x 128 for 132 multiprocessors: one program a tile leaves up to 59 % of
them idle. Here the steps of K of all tiles stand in one row, which is cut into as many equal parts as there are
programs. A program that does not reach the end of a tile leaves its sums in `parts`; the one that does adds them, in
the order of K, and does what follows the product. So equal inputs give equal bits. A program begins with the tile that
it leaves to another, and ends with the one that it waits for.

Tiles are fed by the copy engine (TMA) through STAGES of shared memory into warpgroup instructions. In Gluon, for NVIDIA
GPUs from Hopper on, bf16; all programs run at once. It has not run on a GPU yet: its compilation is tested, and its
values by the tests' own small interpreter, as those of `stream_ring`.

Shapes: M rows, K width in, N width out, P programs, T tiles, KS steps of K.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pi0exp.kernels.gemm_cases import case, cublas
from pi0exp.kernels.gemm_epilogue import activate, checked, reference
from pi0exp.kernels.kernel import AheadOfTime, Case, Kernel, require
from pi0exp.kernels.meetings import wait_until
from pi0exp.kernels.ring import barrier, load_block

BM, BN, BK, STAGES = 128, 128, 64, 6
OPERAND = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16]))


def stream_k_reference(
    x: Tensor, weight: Tensor, parts: Tensor, flags: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """The maths above; parts and flags are read by nobody."""
    return reference(x, weight, bias, residual, None, activation)


# ---- the cut: steps of K of all tiles in a row, numbered tile by tile


@gluon.jit
def cut(program, total, programs):
    """The first step of a program, and of the one behind it."""
    return program * total // programs, (program + 1) * total // programs


@gluon.jit
def owner(step, total, programs):
    """The program that has this step."""
    return ((step + 1) * programs - 1) // total


@gluon.jit
def turn(i, first, last, KS):
    """The i-th step that a program takes: its last tile first, each from its first step on."""
    tile = (last - 1) // KS
    begin = max(first, tile * KS)
    behind = max(0, i - (last - begin))
    earlier = tile - 1 - behind // KS
    return begin + i if i < last - begin else max(first, earlier * KS) + behind % KS


@gluon.jit
def bring(x_desc, w_desc, x_ring, w_ring, ready, i, first, last, KS, tiles_m, BM: gl.constexpr, BN: gl.constexpr,
          BK: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Starts the copies for the i-th step, if the program has so many."""
    there = i < last - first
    step = turn(min(i, last - first - 1), first, last, KS)
    tile, k = step // KS, step % KS
    slot = i % STAGES
    mbarrier.expect(ready.index(slot), (BM + BN) * BK * 2, pred=there)
    load_block(x_desc, [tile % tiles_m * BM, k * BK], ready.index(slot), x_ring.index(slot), pred=there)
    load_block(w_desc, [tile // tiles_m * BN, k * BK], ready.index(slot), w_ring.index(slot), pred=there)


@gluon.jit
def stream_k_gemm_kernel(
    x_desc, w_desc, y_ptr, bias_ptr, residual_ptr, parts_ptr, flags_ptr, M, N, KS, tiles_m, tiles,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Grid (P,), all at once; none without a step. parts: float32 [P, BM, BN]. flags: int32 [P], zeros."""
    me, programs = gl.program_id(0), gl.num_programs(0)
    total = tiles * KS
    first, last = cut(me, total, programs)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], OPERAND)
    w_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], OPERAND)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    barrier()
    for i in gl.static_range(STAGES - 1):
        bring(x_desc, w_desc, x_ring, w_ring, ready, i, first, last, KS, tiles_m, BM, BN, BK, STAGES)
    m_M = gl.arange(0, BM, layout=gl.SliceLayout(1, SUMS))
    n_N = gl.arange(0, BN, layout=gl.SliceLayout(0, SUMS))
    inner = m_M[:, None] * BN + n_N[None, :]
    i = gl.to_tensor(0)
    tile = (last - 1) // KS
    while i < last - first:
        begin = max(first, tile * KS)
        end = min(last, (tile + 1) * KS)
        acc = gl.zeros([BM, BN], gl.float32, layout=SUMS)
        for _ in range(end - begin):
            slot = i % STAGES
            mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
            acc = warpgroup_mma(x_ring.index(slot), w_ring.index(slot).permute([1, 0]), acc, is_async=True)
            # The step before is done, so its slot is free for the one STAGES - 1 steps ahead.
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            barrier()
            bring(
                x_desc, w_desc, x_ring, w_ring, ready, i + STAGES - 1, first, last, KS, tiles_m, BM, BN, BK, STAGES
            )  # fmt: skip
            i += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        if end < (tile + 1) * KS:
            gl.store(parts_ptr + me * (BM * BN) + inner, acc)
            barrier()  # one thread tells for all of them, so all must have stored
            gl.atomic_add(flags_ptr + me, 1, sem="release")
        else:
            if begin > tile * KS:
                before = gl.zeros([BM, BN], gl.float32, layout=SUMS)
                for program in range(owner(tile * KS, total, programs), me):
                    wait_until(flags_ptr + program, 1)
                    barrier()
                    gl.store(flags_ptr + program, 0)
                    before += gl.load(parts_ptr + program * (BM * BN) + inner, cache_modifier=".cg")
                acc = before + acc
            finish(
                acc, tile % tiles_m * BM + m_M, tile // tiles_m * BN + n_N, y_ptr, bias_ptr, residual_ptr, M, N,
                ACTIVATION,
            )  # fmt: skip
        tile -= 1


@gluon.jit
def finish(acc, m_M, n_N, y_ptr, bias_ptr, residual_ptr, M, N, ACTIVATION: gl.constexpr):
    """What follows the product, of one tile."""
    inside = (m_M < M)[:, None] & (n_N < N)[None, :]
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + n_N, mask=n_N < N, other=0.0).to(gl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    at = m_M[:, None] * N + n_N[None, :]
    if residual_ptr is not None:
        acc += gl.load(residual_ptr + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


# ---- the op


@torch.library.custom_op("pi0exp::stream_k_gemm", mutates_args=("parts", "flags"))
def stream_k_gemm(
    x: Tensor, weight: Tensor, parts: Tensor, flags: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """As `stream_k_reference`: x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N], all bf16.

    parts: float32 [P, BM, BN] for at least as many programs as the GPU has multiprocessors; flags: int32 [P], zeros,
    left as zeros; neither shared between streams. K a multiple of 8. activation: none or gelu_tanh. Raises ValueError.
    """
    x_MK, M, N, _ = checked(x, weight, bias, residual, None, activation, False)
    K = weight.shape[1]
    require(x.dtype is torch.bfloat16 and K % 8 == 0, f"x is {x.dtype}, K is {K}: wanted bfloat16 and a multiple of 8")
    require(activation in ("none", "gelu_tanh"), f"activation is {activation!r}: wanted none or gelu_tanh")
    tiles_m, tiles_n, steps = triton.cdiv(M, BM), triton.cdiv(N, BN), triton.cdiv(K, BK)
    programs = min(torch.cuda.get_device_properties(x.device).multi_processor_count, tiles_m * tiles_n * steps)
    fits = parts.dtype is torch.float32 and parts.is_contiguous() and parts.numel() >= programs * BM * BN
    require(fits, f"parts are {parts.dtype} {list(parts.shape)}: wanted float32, contiguous, for {programs} programs")
    require(flags.dtype is torch.int32 and flags.numel() >= programs, f"flags are not int32 for {programs} programs")
    y = x.new_empty((*x.shape[:-1], N))
    stream_k_gemm_kernel[(programs,)](
        x_desc=TensorDescriptor.from_tensor(x_MK, [BM, BK], OPERAND.value),
        w_desc=TensorDescriptor.from_tensor(weight, [BN, BK], OPERAND.value),
        y_ptr=y, bias_ptr=bias, residual_ptr=residual, parts_ptr=parts, flags_ptr=flags, M=M, N=N, KS=steps,
        tiles_m=tiles_m, tiles=tiles_m * tiles_n, BM=BM, BN=BN, BK=BK, STAGES=STAGES, ACTIVATION=activation,
        num_warps=8, launch_cooperative_grid=True,
    )  # fmt: skip
    return y


@stream_k_gemm.register_fake
def _(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _cublas(
    x: Tensor, weight: Tensor, parts: Tensor, flags: Tensor, bias: Tensor | None, residual: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    return cublas(x, weight, bias, residual, None, activation, False)


def _case(name: str, M: int, N: int, K: int, pi0: bool = True, **more: Any) -> Case:
    """A case of `gemm`, with what the programs leave to one another."""
    made = case(name, M, N, K, pi0=pi0, **more)

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, weight, bias, residual, _, activation, _ = made.make(generator, device)
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        parts = torch.zeros(programs, BM, BN, device=device)
        return x, weight, parts, torch.zeros(programs, dtype=torch.int32, device=device), bias, residual, activation

    return Case(name, make, made.flops, made.bytes_moved, pi0, terms=made.terms)


def _ahead(name: str, **constants: Any) -> AheadOfTime:
    fixed = {"BM": BM, "BN": BN, "BK": BK, "STAGES": STAGES, "ACTIVATION": "none"} | constants
    types = dict.fromkeys(("y_ptr", "bias_ptr", "residual_ptr"), "*bf16:16") | {
        "parts_ptr": "*fp32:16", "flags_ptr": "*i32:16",
        "x_desc": f"tensordesc<bf16[{BM}, {BK}],{OPERAND.value!r}>",
        "w_desc": f"tensordesc<bf16[{BN}, {BK}],{OPERAND.value!r}>",
        "M": "i32", "N": "i32:16", "KS": "i32", "tiles_m": "i32", "tiles": "i32",
    }  # fmt: skip
    types = {argument: kind for argument, kind in types.items() if argument not in fixed}
    return AheadOfTime(name, stream_k_gemm_kernel, types, fixed, 8, dots=True, targets=("sm_90",))


KERNELS = (
    Kernel(
        "stream_k_gemm",
        stream_k_gemm,
        stream_k_reference,
        cases=(
            _case("vision qkv, 768 rows", 768, 3456, 1152, bias=True),
            _case("vision out, 768 rows", 768, 1152, 1152, bias=True),
            _case("vision fc1, 768 rows", 768, 4304, 1152, bias=True, activation="gelu_tanh"),
            _case("vision fc2, 768 rows", 768, 1152, 4304, bias=True),
            _case("prefill out", 788, 2048, 2048, residual=True),
            _case("prefill down", 788, 2048, 16384, residual=True),
            _case("one tile for all", 100, 120, 4096, pi0=False, bias=True, residual=True),
            _case("odd sizes", 300, 264, 136, pi0=False, bias=True, activation="gelu_tanh"),
        ),
        ahead_of_time=(
            _ahead("bias", residual_ptr=None),
            _ahead("bias + gelu + residual", ACTIVATION="gelu_tanh"),
        ),
        libraries={"cublas": _cublas},
        interpretable=False,
    ),
)
