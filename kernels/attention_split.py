"""Attention of few rows over many keys: a denoising step (8 heads of 256 on one key/value head, 10 to 51 tokens).

There are too few rows to occupy a GPU, so the keys are split into parts: every program takes a tile of rows over one
part, and a second kernel combines a row's parts, weighing each by exp2(m of the part - m of the row). `attention` has
the maths, the Triton code of the first and the axes' letters.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.attention import attend_kernel, attend_reference
from pi0exp.kernels.attention_cases import GEMMA, LIBRARIES, Heads, ahead_of_time, attention_case
from pi0exp.kernels.attention_launch import LAUNCHES, Launch, attend_arguments, check_arguments, launch_for, split_keys
from pi0exp.kernels.dependent import also_dependent, dependent, launch_behind, wait_for_front
from pi0exp.kernels.kernel import AheadOfTime, Kernel, launchable


@triton.jit
def attend_combine_kernel(
    acc_ptr,
    stats_ptr,
    out_ptr,
    rows,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: ROWS rows of `out` [B, T, N, H] from acc [B, T, N, PARTS, H] and stats [B, T, N, PARTS, 2].

    Programs that reach beyond the last row do that one again.
    """
    wait_for_front(PDL)
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    part = tl.arange(0, PADDED_PARTS)
    h = tl.arange(0, HEAD)
    place = row[:, None] * PARTS + part[None, :]
    exists = (part < PARTS)[None, :]
    largest = tl.load(stats_ptr + place * 2, mask=exists, other=float("-inf"))
    total = tl.load(stats_ptr + place * 2 + 1, mask=exists, other=0.0)
    acc_mask = exists[:, :, None] & (h < H)[None, None, :]
    acc = tl.load(acc_ptr + place[:, :, None] * H + h[None, None, :], mask=acc_mask, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 1)[:, None])
    out = tl.sum(acc * weight[:, :, None], 1) / tl.sum(total * weight, 1)[:, None]
    tl.store(out_ptr + row[:, None] * H + h[None, :], out.to(out_ptr.dtype.element_ty), mask=(h < H)[None, :])


def combine_arguments(
    acc_BTNPH: Tensor, stats: Tensor, out_BTNH: Tensor, launch: Launch
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `attend_combine_kernel`."""
    parts, H = acc_BTNPH.shape[-2:]
    rows = out_BTNH.numel() // H
    arguments: dict[str, Any] = {
        "acc_ptr": acc_BTNPH,
        "stats_ptr": stats,
        "out_ptr": out_BTNH,
        "rows": rows,
        "PARTS": parts,
        "H": H,
        "PADDED_PARTS": triton.next_power_of_2(parts),
        "HEAD": triton.next_power_of_2(H),
        "ROWS": launch.combine_rows,
        "num_warps": 4,
        **launch_behind(dependent(acc_BTNPH)),
    }
    return (triton.cdiv(rows, launch.combine_rows), 1, 1), arguments


@triton_op("pi0exp::attend_split", mutates_args=())
def attend_split(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """The same as `attend_dense`, with the same arguments and errors, for few rows."""
    check_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS)
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    launch = launch_for("denoise", q_BTNH)
    tiles = triton.cdiv(T * N // K, launch.block_m) * B * K
    parts = split_keys(tiles, S, launch)
    out_BTNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    acc_BTNPH, stats = out_BTNH, out_BTNH
    if parts > 1:
        acc_BTNPH = q_BTNH.new_empty((B, T, N, parts, H), dtype=torch.float32)
        stats = q_BTNH.new_empty((B, T, N, parts, 2), dtype=torch.float32)
    grid, arguments = attend_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS, blind, scale, launch, parts, acc_BTNPH, stats)
    launchable(attend_kernel)[grid](**arguments)
    if parts > 1:
        grid, arguments = combine_arguments(acc_BTNPH, stats, out_BTNH, launch)
        launchable(attend_combine_kernel)[grid](**arguments)
    return out_BTNH


HOISTED = "without the state token"

KERNELS = (
    Kernel(
        name="attend_split",
        op=attend_split,
        reference=attend_reference,
        cases=(
            attention_case("denoise, 10 actions", GEMMA, T=11, S=799, blind=True, room=839),
            attention_case("denoise, 50 actions", GEMMA, T=51, S=839, blind=True, room=839),
            attention_case(f"denoise, 10 actions {HOISTED}", GEMMA, T=10, S=799, room=839),
            attention_case(f"denoise, 50 actions {HOISTED}", GEMMA, T=50, S=839, room=839),
            attention_case("denoise, 50 actions, prompt of 200", GEMMA, T=50, S=1018, room=1018),
            attention_case("denoise, middle camera absent", GEMMA, T=11, S=799, blind=True, hidden=(256, 512)),
            attention_case("denoise, batch of 3", GEMMA, B=3, T=11, S=799, blind=True, room=839, pi0=False),
            attention_case("denoise in float16", GEMMA, T=11, S=150, blind=True, pi0=False, dtype=torch.float16),
            attention_case("denoise in float32", GEMMA, T=11, S=150, blind=True, pi0=False, dtype=torch.float32),
            attention_case("one part", GEMMA, T=7, S=20, pi0=False),
            attention_case("small, blind", Heads(8, 1, 32), T=3, S=70, room=80, blind=True, small=True),
            attention_case(
                "small, blind, float32", Heads(4, 1, 32), T=3, S=70, blind=True, dtype=torch.float32, small=True
            ),
            attention_case("small, hidden part", Heads(4, 2, 32), B=2, T=2, S=67, hidden=(16, 49), small=True),
            attention_case(
                "small, blind and masked", Heads(8, 1, 16), T=5, S=45, hidden=(3, 30), blind=True, small=True
            ),
            attention_case("small, padded heads", Heads(2, 2, 72), T=2, S=40, small=True),
            attention_case("small, one part", Heads(8, 1, 16), T=6, S=16, small=True),
            attention_case("small, a row without keys", Heads(1, 1, 16), B=2, T=1, S=33, hidden=(0, 33), small=True),
        ),
        ahead_of_time=also_dependent(
            ahead_of_time("attend, denoise", LAUNCHES["gfx"]["denoise"], GEMMA, parts=13),
            AheadOfTime(
                "attend, combine 13 parts",
                attend_combine_kernel,
                {"acc_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "out_ptr": "*bf16:16", "rows": "i32"},
                {"PARTS": 13, "H": 256, "PADDED_PARTS": 16, "HEAD": 256, "ROWS": 1},
            ),
        ),
        libraries=LIBRARIES,
    ),
)
