"""Patches of pictures, as cameras send them, become tokens: one launch for what are six.

    tokens[b, p] = (2 / 255) sum_k byte[b, p, k] w[k]^T + rest[p]      rest = bias + position[p] - sum_k w[k]^T

which is the convolution without overlap of byte / 127.5 - 1, and the position. The model has the weight in float32, for
which there is no matrix instruction. But a byte is exact in bfloat16, whose significand has 8 bits, and a float32 value
is the sum of three such values, so that three products of bfloat16 summed in float32 are as exact as one of float32.
A patch is read where it lies in the picture: no bytes are moved or widened in memory.

Shapes: B pictures, H, W their sides, P patches of a picture, row by row, S values along a patch's side, K = 3 S^2
values of a patch, D width; of a launch BM patches, BN columns, BK values at a time.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.gemm_epilogue import arch_of
from pi0exp.kernels.kernel import FLOATS, INTERPRETED, AheadOfTime, Case, Kernel, launchable, random, require

SCALE = 2.0 / 255.0
PARTS = tl.constexpr(3)
"""Of a float32 value: 24 bits of significand, 8 each."""
LAUNCHES: dict[str, dict[str, int]] = {
    "sm_90": {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
    "other": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 1},
    "interpreter": {"BM": 64, "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 1},
}
"""By architecture. Begun with, not tuned: on sm_90 108 programs for three pictures, which read the weight six times."""


def prepare(weight_DK: Tensor, bias_D: Tensor, position_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of the weight, bfloat16 [3, K, D], and the rest, float32 [P, D], of the convolution's own parameters.

    weight: in the order of a patch's values, which is row, column, colour; its scale goes into the parts.
    """
    left = (weight_DK.float() * SCALE).t().contiguous()
    parts = []
    for _ in range(PARTS.value):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1].float()
    shift_D = bias_D.double() - weight_DK.double().sum(dim=1)
    return torch.stack(parts), (position_PD.double() + shift_D).float().contiguous()


def patch_embed_reference(image_BHW3: Tensor, parts_3KD: Tensor, rest_PD: Tensor, size: int, like: Tensor) -> Tensor:
    """The maths above, [B, P, D] of the dtype of `like`."""
    B, H, W, _ = image_BHW3.shape
    patches = image_BHW3.reshape(B, H // size, size, W // size, size * 3).transpose(2, 3).reshape(B, -1, 3 * size**2)
    weight_KD = parts_3KD.to(rest_PD.dtype).sum(dim=0)
    return (patches.to(rest_PD.dtype) @ weight_KD + rest_PD).to(like.dtype)


@triton.jit
def patch_embed_kernel(
    image_ptr, parts_ptr, rest_ptr, out_ptr, M, P, across, H, W,
    D: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of BM of all M patches, `across` of which lie side by side. Grid (M / BM, D / BN)."""
    wait_for_front(PDL)
    K: tl.constexpr = 3 * SIZE * SIZE
    m_M = tl.program_id(0) * BM + tl.arange(0, BM)
    n_N = tl.program_id(1) * BN + tl.arange(0, BN)
    p_M = m_M % P
    first_M = (m_M // P * H + p_M // across * SIZE) * W * 3 + p_M % across * (SIZE * 3)
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, K, BK):
        k_K = step + tl.arange(0, BK)
        at_K = k_K // (SIZE * 3) * (W * 3) + k_K % (SIZE * 3)
        there = (m_M < M)[:, None] & (k_K < K)[None, :]
        bytes_MK = tl.load(image_ptr + first_M[:, None] + at_K[None, :], mask=there, other=0)
        values_MK = bytes_MK.to(tl.float32).to(parts_ptr.dtype.element_ty)
        if UPCAST:
            values_MK = values_MK.to(tl.float32)
        for i in tl.static_range(PARTS):  # the smallest part first
            at = parts_ptr + ((PARTS - 1 - i) * K + k_K[:, None]) * D + n_N[None, :]
            w_KN = tl.load(at, mask=(k_K < K)[:, None] & (n_N < D)[None, :], other=0.0)
            if UPCAST:
                w_KN = w_KN.to(tl.float32)
            acc = tl.dot(values_MK, w_KN, acc, input_precision="ieee")
    inside = (m_M < M)[:, None] & (n_N < D)[None, :]
    acc += tl.load(rest_ptr + p_M[:, None] * D + n_N[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + m_M[:, None] * D + n_N[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton_op("pi0exp::patch_embed", mutates_args=())
def patch_embed(image_BHW3: Tensor, parts_3KD: Tensor, rest_PD: Tensor, size: int, like: Tensor) -> Tensor:
    """Tokens [B, P, D] of the dtype of `like`, contiguous, rounded once.

    image: uint8, contiguous, sides that are multiples of `size`, the side of a patch. parts, rest: of `prepare`.
    Raises ValueError for other arguments.
    """
    (B, H, W, colours), (P, D) = image_BHW3.shape, rest_PD.shape
    require(image_BHW3.dtype == torch.uint8 and colours == 3, f"pictures are {image_BHW3.dtype}, {colours} colours")
    require(image_BHW3.is_contiguous(), "the pictures are not contiguous")
    sides = f"pictures of {H} x {W}, patches of {size}"
    require(H % size == W % size == 0 and (H // size) * (W // size) == P, f"{sides}: not {P} patches")
    found = f"parts are {parts_3KD.dtype} {list(parts_3KD.shape)}, the rest {rest_PD.dtype}"
    fits = parts_3KD.shape == (PARTS.value, 3 * size**2, D) and parts_3KD.is_contiguous() and rest_PD.is_contiguous()
    require(fits and (parts_3KD.dtype, rest_PD.dtype) == (torch.bfloat16, torch.float32), f"{found}: not of `prepare`")
    require(like.dtype in FLOATS, f"{like.dtype} is none of {FLOATS}")
    out_BPD = torch.empty((B, P, D), dtype=like.dtype, device=image_BHW3.device)
    arch = "interpreter" if INTERPRETED else arch_of(image_BHW3.device)
    launch = LAUNCHES.get(arch, LAUNCHES["other"])
    launchable(patch_embed_kernel)[(triton.cdiv(B * P, launch["BM"]), triton.cdiv(D, launch["BN"]))](
        image_BHW3, parts_3KD, rest_PD, out_BPD, B * P, P, W // size, H, W, D=D, SIZE=size, PARTS=PARTS.value,
        UPCAST=INTERPRETED, **launch, **launch_behind(dependent(image_BHW3)),
    )  # fmt: skip
    return out_BPD


def _arguments(
    generator: torch.Generator, device: torch.device, B: int, side: int, size: int, D: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    K, P = 3 * size**2, (side // size) ** 2
    image = torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, generator=generator, device=device)
    weight = random(generator, device, D, K, dtype=torch.float32) * K**-0.5
    bias, position = (random(generator, device, *shape, dtype=torch.float32) for shape in ((D,), (P, D)))
    parts, rest = prepare(weight, bias, position)
    return image, parts, rest, size, torch.empty(0, dtype=dtype, device=device)


def _case(
    name: str, B: int, side: int = 224, size: int = 14, D: int = 1152, dtype: torch.dtype = torch.bfloat16,
    pi0: bool = True, small: bool = False,
) -> Case:  # fmt: skip
    K, P = 3 * size**2, (side // size) ** 2
    make = partial(_arguments, B=B, side=side, size=size, D=D, dtype=dtype)
    moved = B * side**2 * 3 + 2 * PARTS.value * K * D + 4 * P * D + dtype.itemsize * B * P * D
    return Case(name, make, 2.0 * PARTS.value * B * P * K * D, moved, pi0=pi0, small=small, terms=PARTS.value * K)


def _ahead(name: str, launch: str, targets: tuple[str, ...]) -> AheadOfTime:
    chosen = dict(LAUNCHES[launch])
    types = {"image_ptr": "*u8:16", "parts_ptr": "*bf16:16", "rest_ptr": "*fp32:16", "out_ptr": "*bf16:16"}
    types |= dict.fromkeys(("M", "P", "across", "H", "W"), "i32:16")
    constants = {"D": 1152, "SIZE": 14, "PARTS": PARTS.value, "UPCAST": False, "PDL": False}
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    return AheadOfTime(name, patch_embed_kernel, types, constants | chosen, warps, stages, dots=True, targets=targets)


KERNELS = (
    Kernel(
        "patch_embed",
        patch_embed,
        patch_embed_reference,
        (
            _case("3 cameras", 3),
            _case("2 cameras", 2),
            _case("1 camera", 1),
            _case("float32", 2, dtype=torch.float32, pi0=False),
            _case("8 x 8 patches of 5", 2, side=40, size=5, D=72, pi0=False, small=True),
            _case("one patch, float32", 3, side=4, size=4, D=16, dtype=torch.float32, pi0=False, small=True),
        ),
        (
            *also_dependent(_ahead("pictures", "sm_90", ("sm_90",))),
            _ahead("pictures, small tiles", "other", ("gfx942", "gfx950")),
        ),
    ),
)
