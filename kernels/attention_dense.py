"""Attention of many rows: vision (16 heads of 72 over 256 patches), prefill (8 heads of 256 on one key/value head).

A program takes a tile of rows over all keys. `attention` has the maths, the Triton code and the axes' letters.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.library import triton_op

from pi0exp.kernels.attention import attend_kernel, attend_reference
from pi0exp.kernels.attention_cases import GEMMA, LIBRARIES, VISION, Heads, ahead_of_time, attention_case
from pi0exp.kernels.attention_launch import LAUNCHES, attend_arguments, check_arguments, launch_for
from pi0exp.kernels.dependent import also_dependent
from pi0exp.kernels.kernel import Kernel, launchable


@triton_op("pi0exp::attend_dense", mutates_args=())
def attend_dense(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool, scale: float
) -> Tensor:
    """softmax(scale q k^T) v: [B, T, N, H] of q's dtype, contiguous. K must divide N.

    q, k, v: bfloat16, float16 or float32, any strides with a contiguous head dim. keys_BS: bool, False for keys that
    nobody may see; None if all may be seen. blind: the first query sees only the keys before the last T and itself,
    which is key S - T. Raises ValueError for other arguments.
    """
    check_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS)
    out_BTNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    launch = launch_for("vision" if q_BTNH.shape[-1] <= 128 else "prefill", q_BTNH)
    grid, arguments = attend_arguments(
        q_BTNH, k_BSKH, v_BSKH, keys_BS, blind, scale, launch, 1, out_BTNH, stats=out_BTNH
    )
    launchable(attend_kernel)[grid](**arguments)
    return out_BTNH


AMD = LAUNCHES["gfx"]  # compiled for every architecture, as it fits into the least shared memory

KERNELS = (
    Kernel(
        name="attend_dense",
        op=attend_dense,
        reference=attend_reference,
        cases=(
            attention_case("vision, 3 cameras", VISION, B=3, T=256, S=256),
            attention_case("vision, 2 cameras", VISION, B=2, T=256, S=256),
            attention_case("vision, 1 camera", VISION, B=1, T=256, S=256),
            attention_case("prefill, 3 cameras", GEMMA, T=788, S=788),
            attention_case("prefill, 2 cameras", GEMMA, T=532, S=532),
            attention_case("prefill, prompt of 200", GEMMA, T=968, S=968),
            attention_case("prefill, middle camera absent", GEMMA, T=788, S=788, hidden=(256, 512)),
            attention_case("vision in float16", VISION, T=256, S=256, pi0=False, dtype=torch.float16),
            attention_case("vision in float32", VISION, T=256, S=256, pi0=False, dtype=torch.float32),
            attention_case("prefill in float32", GEMMA, T=130, S=130, pi0=False, dtype=torch.float32),
            attention_case("keys and values in a larger cache", GEMMA, B=2, T=70, S=133, room=150, pi0=False),
            attention_case("blind and masked", GEMMA, B=2, T=33, S=99, hidden=(10, 40), blind=True, pi0=False),
            attention_case("small", Heads(2, 2, 72), B=2, T=13, S=13, small=True),
            attention_case("small, float32", Heads(2, 2, 72), T=21, S=21, dtype=torch.float32, small=True),
            attention_case("small, masked in the middle", Heads(4, 2, 32), B=2, T=9, S=56, hidden=(5, 40), small=True),
            attention_case("small, blind", Heads(8, 1, 16), T=5, S=37, room=40, blind=True, small=True),
            attention_case("small, a row without keys", Heads(1, 1, 16), B=2, T=4, S=33, hidden=(0, 33), small=True),
        ),
        ahead_of_time=also_dependent(
            ahead_of_time("attend, vision", AMD["vision"], VISION),
            ahead_of_time("attend, vision in two tiles", replace(AMD["vision"], tail=True), VISION),
            ahead_of_time("attend, prefill", AMD["prefill"], GEMMA),
        ),
        libraries=LIBRARIES,
    ),
)
