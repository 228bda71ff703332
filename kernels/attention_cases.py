"""The sizes at which the attention kernels are tested and timed, the libraries beside them, and compiles without a GPU.

The axes' letters are those of `attention`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0exp.kernels.attention import HIDDEN, attend_kernel
from pi0exp.kernels.attention_launch import Launch
from pi0exp.kernels.kernel import AheadOfTime, Case, random


class Heads(NamedTuple):
    """How many query heads, key/value heads and values of each."""

    N: int
    K: int
    H: int


VISION, GEMMA = Heads(16, 16, 72), Heads(8, 1, 256)


def attention_case(
    name: str,
    heads: Heads,
    *,
    T: int,
    S: int,
    B: int = 1,
    room: int | None = None,
    hidden: tuple[int, int] | None = None,
    blind: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    pi0: bool = True,
    small: bool = False,
) -> Case:
    """room: k and v are the first S keys of a buffer of that many. hidden: row b may not see keys [hidden[0] + b,
    hidden[1]). Scores have a standard deviation of 2.5, as in trained attention.
    """

    N, K, H = heads

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        q_BTNH = 2.5 * random(generator, device, B, T, N, H, dtype=dtype)
        k_BSKH, v_BSKH = (random(generator, device, B, room or S, K, H, dtype=dtype)[:, :S] for _ in range(2))
        keys_BS = None
        if hidden is not None:
            key_S, row_B = torch.arange(S, device=device), torch.arange(B, device=device)
            keys_BS = (key_S < hidden[0] + row_B[:, None]) | (key_S >= hidden[1])
        return q_BTNH, k_BSKH, v_BSKH, keys_BS, blind, H**-0.5

    values = 2 * B * T * N * H + 2 * B * S * K * H
    moved = values * dtype.itemsize + (0 if hidden is None else B * S)
    return Case(name, make, 4.0 * B * N * T * S * H, float(moved), pi0=pi0 and not small, small=small, terms=H + S)


def _sdpa(
    backend: SDPBackend,
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    keys_BS: Tensor | None,
    blind: bool,
    scale: float,
) -> Tensor:
    """One backend of PyTorch; raises NotImplementedError where it has no kernel.

    Without hidden keys the blind query is an attention of its own, so that the others need no mask.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if blind and keys_BS is None:
        seen = S - T + 1
        first = _sdpa(backend, q_BTNH[:, :1], k_BSKH[:, :seen], v_BSKH[:, :seen], None, False, scale)
        return torch.cat([first, _sdpa(backend, q_BTNH[:, 1:], k_BSKH, v_BSKH, None, False, scale)], dim=1)
    k_BNSH, v_BNSH = (
        x_BSKH.transpose(1, 2)[:, :, None].expand(B, K, N // K, S, H).reshape(B, N, S, H) for x_BSKH in (k_BSKH, v_BSKH)
    )
    mask = None
    if keys_BS is not None:
        mask = keys_BS[:, None, None].expand(B, 1, T, S)
        if blind:
            mask = mask.clone()
            mask[:, :, 0, S - T + 1 :] = False
    if backend is SDPBackend.FLASH_ATTENTION and mask is not None:
        raise NotImplementedError("flash attention takes no mask")
    if backend is not SDPBackend.EFFICIENT_ATTENTION and q_BTNH.dtype == torch.float32:
        raise NotImplementedError(f"{backend.name} takes no float32")
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2), k_BNSH, v_BNSH, attn_mask=mask, scale=scale
        ).transpose(1, 2)


LIBRARIES: Mapping[str, Callable[..., Tensor]] = {
    "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
}


def ahead_of_time(name: str, launch: Launch, heads: Heads, parts: int = 1) -> AheadOfTime:
    """`attend_kernel` with every mask, in bfloat16."""
    (N, K, H), (head, tail) = heads, launch.columns(heads.H)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16:16") | dict.fromkeys(("q_b", "k_b", "v_b"), "i32:16")
    types |= {"keys_ptr": "*i1:16", "out_ptr": "*fp32:16" if parts > 1 else "*bf16:16", "stats_ptr": "*fp32:16"}
    types |= dict.fromkeys(("keys_b", "keys_s", "T", "S", "heads_kv"), "i32") | {"part_keys": "i32:16", "scale": "fp32"}
    constants = {
        "Q_T": N * H,
        "Q_N": H,
        "K_S": K * H,
        "K_K": H,
        "V_S": K * H,
        "V_K": H,
        "GROUP": N // K,
        "H": H,
        "HEAD": head,
        "TAIL": tail,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PARTS": parts,
        "MASKED": True,
        "BLIND": True,
        "HIDDEN": HIDDEN,
        "UPCAST": False,
    }
    return AheadOfTime(name, attend_kernel, types, constants, launch.num_warps, launch.num_stages, dots=True)
