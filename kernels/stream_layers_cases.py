"""What `stream_layers` is tested, timed and compiled with, and `stream_ring`, with its weights in another order."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from pi0exp.kernels.attention import HIDDEN
from pi0exp.kernels.kernel import AheadOfTime, Case, random
from pi0exp.kernels.stream import counters_on
from pi0exp.kernels.stream_pack import Shape, Weights, pack

Packed = Callable[[Weights, int], Iterable[torch.Tensor]]


def _arguments(
    generator: torch.Generator, device: torch.device, sizes: tuple[int, ...], start: int, settled: int, adaptive: bool,
    hidden: bool, dtype: torch.dtype, eps: float, packed: Packed,
) -> tuple[Any, ...]:  # fmt: skip
    L, T, D, N, H, F = sizes
    C, floats = (N + 2) * H, partial(random, generator, device, dtype=torch.float32)
    scales = 0.2 * floats(2 * L + 1, D)
    angles = 6.0 * floats(1, T, 1, H // 2)
    keys = torch.ones(1, start + T, dtype=torch.bool, device=device)
    keys[:, : start // 3] = False
    return (
        floats(1, T, D), *packed(Weights(
            random(generator, device, L, C, D, dtype=dtype) * D**-0.5,
            random(generator, device, L, D, N * H, dtype=dtype) * (N * H) ** -0.5,
            random(generator, device, L, 2 * F, D, dtype=dtype) * D**-0.5,
            random(generator, device, L, D, F, dtype=dtype) * F**-0.5,
        ), H),
        scales, 0.5 * floats(2 * L, D) if adaptive else None, 0.1 * floats(L, C) if adaptive else None,
        0.1 * floats(L, 2 * F) if adaptive else None,
        torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1),
        random(generator, device, L, 1, start + T + 1, 2, H, dtype=dtype), start,
        keys if hidden else None, not adaptive, H**-0.5, settled, eps, counters_on(device), None,
    )  # fmt: skip


def case(
    name: str, L: int, T: int, widths: tuple[int, int, int, int], *, start: int, settled: int, adaptive: bool = False,
    hidden: bool = False, dtype: torch.dtype = torch.bfloat16, pi0: bool = False, small: bool = False,
    packed: Packed = pack,
) -> Case:  # fmt: skip
    D, N, H, F = widths
    make = partial(
        _arguments, sizes=(L, T, *widths), start=start, settled=settled, adaptive=adaptive, hidden=hidden, dtype=dtype,
        eps=1e-6 if pi0 else 0.5, packed=packed,
    )  # fmt: skip
    weights = L * D * ((N + 2) * H + N * H + 3 * F)
    flops = 2.0 * T * weights + 4.0 * L * T * N * H * (start + T)
    moved = float(dtype.itemsize * (weights + 2 * L * (start + T) * H))
    return Case(name, make, flops, moved, pi0=pi0, small=small, mutates=(11 if packed is pack else 8,), terms=F)


_FLOATS = ("tokens_ptr", "squares_ptr", "scales_ptr", "gates_ptr", "qkv_offsets_ptr", "gate_up_offsets_ptr",
           "cos_ptr", "sin_ptr", "acc_ptr", "stats_ptr")  # fmt: skip
_INTEGERS = ("M", "start", "settled", "parts", "L")
_STRIDES = ("scales_N", "gates_N", "qkv_offsets_L", "gate_up_offsets_L", "cos_T", "sin_T", "rooms_L", "rooms_S")


def types_of(kernel: Any) -> dict[str, str]:
    """Of the arguments of either kernel."""
    types = dict.fromkeys(_FLOATS, "*fp32:16") | dict.fromkeys(_INTEGERS, "i32") | dict.fromkeys(_STRIDES, "i32:16")
    types |= {"slots_ptr": "*i32:16", "clocks_ptr": "*i64:16", "keys_ptr": "*i1:16", "scale": "fp32", "eps": "fp32"}
    pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    return types | {argument: "*bf16:16" for argument in pointers if argument not in types}


SIZES: dict[str, Any] = {
    "D": 1024, "HEADS": 8, "HEADS_KV": 1, "H": 256, "F": 4096, "PARTS": 16, "MASKED": False, "BLIND": True,
    "HIDDEN": HIDDEN, "clocks_ptr": None,
}  # fmt: skip


def ahead(name: str, kernel: Any, clocks: bool = False, **constants: Any) -> AheadOfTime:
    fixed = SIZES | Shape().constants(1024, 8, 256, 4096) | {"PROGRAMS": 132, "UPCAST": False} | constants
    if clocks:
        del fixed["clocks_ptr"]
    types = {argument: kind for argument, kind in types_of(kernel).items() if argument not in fixed}
    return AheadOfTime(name, kernel, types, fixed, Shape().GROUPS, 1, dots=True, targets=("sm_90",))


PI0 = (1024, 8, 256, 4096)
"""Width, query heads, head dim, hidden width."""
_SMALL = (64, 8, 32, 128)
_SMALLER = (32, 8, 32, 96)


CASES = (
    case("a step of 11 rows", 18, 11, PI0, start=788, settled=788, pi0=True),
    case("a step of 10 rows, adaptive", 18, 10, PI0, start=789, settled=788, adaptive=True, pi0=True),
    case("one layer, 16 rows, prompt of 200, hidden keys", 1, 16, PI0, start=968, settled=968, hidden=True),
    case("three layers, a short cache", 3, 5, PI0, start=20, settled=0),
    case("one layer, small", 1, 3, _SMALL, start=40, settled=38),
    case("small, hidden keys", 3, 2, _SMALL, start=9, settled=0, hidden=True, dtype=torch.float32, small=True),
    case("small, adaptive", 2, 9, _SMALLER, start=41, settled=40, adaptive=True, dtype=torch.float32, small=True),
)
