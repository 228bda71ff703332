"""What the kernels of a whole denoising step take and make: `stream_layers`, `stream_ring` and `stream_wide`.

Shapes: T rows, D width, L layers, C = (N + 2 K) H rows of w_qkv, N query heads, K key/value heads, H head dim, F hidden
width, R rows of a room, S rows of the cache.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pi0exp.kernels.attention import HIDDEN
from pi0exp.kernels.kernel import require
from pi0exp.kernels.skinny_gemm import check_counters
from pi0exp.kernels.stream_pack import COLUMNS, ROWS

PHASES = 6


class Sizes(NamedTuple):
    """Of a model: layers, heads, head dim and hidden width; what the weights are of. Of a kernel: rows, and phases."""

    L: int
    N: int
    H: int
    F: int
    dtype: torch.dtype
    rows: int = ROWS.value
    phases: int = PHASES


def launch_arguments(
    sizes: Sizes, programs: int, BN: int, tokens_BTD: Tensor, scales_ND: Tensor, gates_ND: Tensor | None,
    qkv_offsets_LC: Tensor | None, gate_up_offsets_LC: Tensor | None, cos_BT1H: Tensor, sin_BT1H: Tensor,
    rooms_LBSMH: Tensor, start: int, keys_BS: Tensor | None, blind: bool, scale: float, settled: int, eps: float,
    slots: Tensor, clocks: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels are launched with beside their weights and tiles; what they make is `end_ptr`, `squares_ptr`.

    programs: of the launch. BN: keys of a block. The others are the ops' arguments. Raises ValueError where they do not
    fit.
    """
    L, N, H, F, dtype, rows, phases = sizes
    (B, T, D), (_, _, R, heads, _) = tokens_BTD.shape, rooms_LBSMH.shape
    K = heads // 2
    C = (N + heads) * H
    require(B == 1 and rows >= T, f"tokens are {list(tokens_BTD.shape)}: not [1, at most {rows}, D]")
    require(tokens_BTD.is_contiguous() and tokens_BTD.is_floating_point(), "tokens are not contiguous floats")
    for name, table, fit in (
        ("scales", scales_ND, (2 * L + 1, D)), ("gates", gates_ND, (2 * L, D)), ("offsets", qkv_offsets_LC, (L, C)),
        ("offsets", gate_up_offsets_LC, (L, 2 * F)),
    ):  # fmt: skip
        fits = table is None or (table.shape == fit and table.stride(1) == 1)
        require(fits, f"{name} are {None if table is None else list(table.shape)}: not {list(fit)}")
    require(rooms_LBSMH.shape == (L, 1, R, heads, H) and rooms_LBSMH.dtype is dtype, "the rooms do not fit")
    require(rooms_LBSMH.stride()[3:] == (H, 1), "heads must be adjacent in the rooms")
    require(0 <= settled <= start <= R - T, f"rows {start} to {start + T} of {R}, of which {settled} are settled")
    seen = keys_BS is None or (keys_BS.shape == (1, start + T) and keys_BS.stride(1) == 1)
    require(seen, "keys are not [1, start + T], adjacent")
    for turn in (cos_BT1H, sin_BT1H):
        require(turn.shape == (1, T, 1, H) and turn.stride(3) == 1, f"{tuple(turn.shape)} turns no [1, {T}, 1, {H}]")
    check_counters(slots, phases * L + 1)
    check_clocks(clocks, phases * L, programs)
    parts = triton.cdiv(start + T, BN)

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return tokens_BTD.new_empty(size, dtype=of)

    return {
        "tokens_ptr": tokens_BTD, "x_ptr": empty(T, D), "xs_ptr": empty(rows, D), "end_ptr": empty(1, T, D),
        "squares_ptr": empty(D // COLUMNS.value, T, of=torch.float32), "scales_ptr": scales_ND, "gates_ptr": gates_ND,
        "qkv_offsets_ptr": qkv_offsets_LC, "gate_up_offsets_ptr": gate_up_offsets_LC, "cos_ptr": cos_BT1H,
        "sin_ptr": sin_BT1H, "rooms_ptr": rooms_LBSMH, "keys_ptr": slots if keys_BS is None else keys_BS,
        "q_ptr": empty(T, N * H), "acc_ptr": empty(N, parts, rows, H, of=torch.float32),
        "stats_ptr": empty(N, 2, parts, rows, of=torch.float32), "mixed_ptr": empty(rows, N * H),
        "hidden_ptr": empty(rows, F), "slots_ptr": slots, "clocks_ptr": clocks, "M": T, "start": start,
        "settled": settled, "parts": parts, "L": L, "scale": scale, "eps": eps, "scales_N": scales_ND.stride(0),
        "gates_N": row_stride(gates_ND), "qkv_offsets_L": row_stride(qkv_offsets_LC),
        "gate_up_offsets_L": row_stride(gate_up_offsets_LC), "cos_T": cos_BT1H.stride(1), "sin_T": sin_BT1H.stride(1),
        "rooms_L": rooms_LBSMH.stride(0), "rooms_S": rooms_LBSMH.stride(2), "D": D, "HEADS": N, "HEADS_KV": K, "H": H,
        "F": F, "PARTS": triton.next_power_of_2(parts), "MASKED": keys_BS is not None, "BLIND": blind, "HIDDEN": HIDDEN,
    }  # fmt: skip


def check_clocks(clocks: Tensor | None, meetings: int, programs: int) -> None:
    """Raises ValueError where they are no numbers of the clock, or not one for each meeting and program."""
    wanted = (2 * meetings, programs)
    fits = clocks is None or (clocks.dtype is torch.int64 and clocks.is_contiguous() and clocks.shape == wanted)
    require(fits, f"clocks are not int64 {list(wanted)}")


def row_stride(table: Tensor | None) -> int:
    return 0 if table is None else table.stride(0)
