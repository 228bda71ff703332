"""How the attention kernel is launched: tiles by architecture and stage, arguments, and what the ops refuse.

The axes' letters are those of `attention`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from pi0exp.kernels.attention import HIDDEN
from pi0exp.kernels.dependent import dependent, launch_behind
from pi0exp.kernels.kernel import FLOATS, INTERPRETED, require


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a tile, and how it is compiled.

    programs: about how many the keys are split for; 1 does not split. combine_rows: of how many rows a program then
    combines the parts. tail: whether the last columns of a head dim that is no power of two are a second, smaller tile
    (72 = 64 + 8 of 16) instead of being padded with the rest (72 of 128).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1
    combine_rows: int = 1
    tail: bool = False

    def columns(self, head_dim: int) -> tuple[int, int]:
        """HEAD and TAIL. A product of Triton has at least 16 columns."""
        padded = max(16, triton.next_power_of_2(head_dim))
        if padded <= head_dim or not self.tail or head_dim < 32:
            return padded, 0
        return padded // 2, max(16, triton.next_power_of_2(head_dim - padded // 2))


LAUNCHES: dict[str, dict[str, Launch]] = {
    # NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-24. A vision tile with a tail and one stage computes something else
    # there (Triton 3.6 only; found by the sweep), so it must have two.
    "sm_90": {
        "vision": Launch(64, 128, 4, 2, tail=True),
        "prefill": Launch(64, 64, 4, 3),
        "denoise": Launch(32, 128, 4, 2, programs=100),
        "denoise, few rows": Launch(16, 64, 4, 1, programs=100),
    },
    # AMD's MI300X and MI350X: without spills in 64 KiB of shared memory; not tuned, no such machine was there.
    "gfx": {
        "vision": Launch(64, 32, 4, 1),
        "prefill": Launch(64, 16, 4, 1),
        "denoise": Launch(16, 32, 4, 1, programs=256),
    },
    # Any other GPU: fits in 99 KiB of shared memory, not tuned.
    "other": {
        "vision": Launch(64, 64, 4, 2),
        "prefill": Launch(64, 32, 4, 2),
        "denoise": Launch(32, 32, 4, 2, programs=132),
    },
    # Small, so that small tests have several blocks and parts.
    "interpreter": {
        "vision": Launch(32, 16, 4, 1, tail=True),
        "prefill": Launch(64, 32, 4, 1),
        "denoise": Launch(32, 16, 4, 1, programs=8, combine_rows=32),
    },
}
"""Architecture -> stage -> parameters. The stage is told by the op and the head dim; see `launch_for`."""
FEW_ROWS = 128
"""Query tokens times heads: 88 for a horizon of 10 with the state's token, 408 for one of 50."""
FLOAT32 = Launch(16, 32, 4, 1, programs=132)
"""Of float32 on every GPU: without matrix units its products are unrolled, so a larger tile spills registers."""


def launch_for(stage: str, q: Tensor) -> Launch:
    """The parameters for a stage on the device and for the dtype of `q`.

    A stage of which there is a variant for few rows takes that where the heads of a key/value head make few rows.
    """
    arch = architecture(q.device)
    if q.dtype == torch.float32 and arch != "interpreter":
        return FLOAT32
    table, few = LAUNCHES[arch], f"{stage}, few rows"
    return table[few] if few in table and q.shape[1] * q.shape[2] <= FEW_ROWS else table[stage]


@cache
def architecture(device: torch.device) -> str:
    """The key of `LAUNCHES` for a device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx"
    found = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return found if found in LAUNCHES else "other"


def attend_arguments(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    keys_BS: Tensor | None,
    blind: bool,
    scale: float,
    launch: Launch,
    parts: int,
    out: Tensor,
    stats: Tensor,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `attend_kernel` for `parts` as `split_keys` gives them."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, (head, tail) = N // K, launch.columns(H)
    keys = q_BTNH if keys_BS is None else keys_BS  # not read if there is none, but a pointer it must be
    arguments: dict[str, Any] = {
        "q_ptr": q_BTNH,
        "k_ptr": k_BSKH,
        "v_ptr": v_BSKH,
        "keys_ptr": keys,
        "out_ptr": out,
        "stats_ptr": stats,
        "q_b": q_BTNH.stride(0),
        "k_b": k_BSKH.stride(0),
        "v_b": v_BSKH.stride(0),
        "keys_b": keys.stride(0),
        "keys_s": keys.stride(1),
        "T": T,
        "S": S,
        "heads_kv": K,
        "part_keys": triton.cdiv(triton.cdiv(S, launch.block_n), parts) * launch.block_n,
        "scale": scale,
        "Q_T": q_BTNH.stride(1),
        "Q_N": q_BTNH.stride(2),
        "K_S": k_BSKH.stride(1),
        "K_K": k_BSKH.stride(2),
        "V_S": v_BSKH.stride(1),
        "V_K": v_BSKH.stride(2),
        "GROUP": G,
        "H": H,
        "HEAD": head,
        "TAIL": tail,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PARTS": parts,
        "MASKED": keys_BS is not None,
        "BLIND": blind,
        "HIDDEN": HIDDEN,
        "UPCAST": INTERPRETED,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **launch_behind(dependent(q_BTNH)),
    }
    return (triton.cdiv(T * G, launch.block_m), parts, B * K), arguments


def split_keys(tiles: int, keys: int, launch: Launch) -> int:
    """Into how many parts the keys go so that about `launch.programs` programs run, `tiles` of them for each part.

    Parts are whole blocks of keys, as equal as can be, and none is empty.
    """
    blocks = triton.cdiv(keys, launch.block_n)
    wanted = min(max(launch.programs // tiles, 1), blocks)
    return int(triton.cdiv(blocks, triton.cdiv(blocks, wanted)))


def check_arguments(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None) -> None:
    """Raises ValueError where shapes, dtypes or strides are not the ops'."""
    B, _, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    tensors = (q_BTNH, k_BSKH, v_BSKH)
    require(
        k_BSKH.shape == (B, S, K, H) and v_BSKH.shape == k_BSKH.shape and N % K == 0,
        f"q {list(q_BTNH.shape)}, k {list(k_BSKH.shape)} and v {list(v_BSKH.shape)} do not fit each other",
    )
    require(len({x.dtype for x in tensors}) == 1, f"q, k and v are of {[x.dtype for x in tensors]}, not of one dtype")
    require(q_BTNH.dtype in FLOATS, f"{q_BTNH.dtype} is none of {FLOATS}")
    require(all(x.stride(-1) == 1 for x in tensors), "the values of a head must be adjacent in q, k and v")
    require(B * K < 2**16, f"{B} x {K} key/value heads: a grid takes 65535")
    if keys_BS is not None:
        found = f"keys are {keys_BS.dtype} {list(keys_BS.shape)}"
        require(keys_BS.shape == (B, S) and keys_BS.dtype == torch.bool, f"{found}; wanted {torch.bool} {[B, S]}")
