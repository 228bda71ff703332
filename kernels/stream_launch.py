"""How the kernels of a denoising step are launched: a table for each GPU architecture, kept or committed here.

`python -m pi0exp.kernels.tune` times launches on a GPU and keeps the best in `tables/<architecture>.json`, with the
date, the machine and what each took; that file wins over `START`, which is where a GPU begins that was never tuned.

A name is `op rows CxK`: rows padded to 16, 32 or 64, and the weight's shape; for attention `op rows`, rows being query
tokens times heads, padded to a power of two.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pi0exp.kernels.gemm_epilogue import arch_of
from pi0exp.kernels.skinny_gemm import FLOAT32, OTHERS, Launch, padded

TABLES = Path(__file__).resolve().parent / "tables"


@dataclass(frozen=True)
class Attend:
    """BM rows (query tokens times the heads of a key/value head) and BN keys of a program; COLUMNS programs share the
    values' columns; HELD: keys and values that stood before the chain began are read before waiting.
    """

    BM: int
    BN: int
    COLUMNS: int = 1
    HELD: bool = True
    num_warps: int = 4
    pdl: bool = True


# Of the products: the best of 453 launches in a chain of products alone (skinny_gemm.LAUNCH; H200, torch 2.11, Triton
# 3.6, 2026-11-24). Of attention: tiles of `attend_split`'s table, cut to one block of keys a program; not timed yet.
START: dict[str, dict[str, Launch | Attend]] = {
    "sm_90": {
        "stream_qkv 16 2560x1024": Launch(32, 256, SPLITS=2, HELD=True, X_LEFT=True, num_warps=2),
        "stream_residual 16 1024x2048": Launch(64, 256, SPLITS=4, HELD=True),
        "stream_gated 16 8192x1024": Launch(32, 256, SPLITS=2, HELD=True),
        "stream_residual 16 1024x4096": Launch(64, 256, SPLITS=8, HELD=True, X_LEFT=True, num_warps=8),
        "stream_qkv 64 2560x1024": Launch(16, 128, X_LEFT=True, num_stages=6),
        "stream_residual 64 1024x2048": Launch(16, 256, SPLITS=2, X_LEFT=True, num_stages=4),
        "stream_gated 64 8192x1024": Launch(32, 128, num_stages=6),
        "stream_residual 64 1024x4096": Launch(64, 128, SPLITS=8, num_stages=4),
        "stream_attention 128": Attend(16, 64, COLUMNS=2),
        "stream_attention 512": Attend(64, 64, COLUMNS=2, num_warps=8),
    },
    # Small, with every branch: splits, held weights, several parts and columns.
    "cpu": {"stream_attention": Attend(16, 16, COLUMNS=2)},
}
INTERPRETED_PRODUCT, INTERPRETED_FLOAT32 = Launch(16, 32, SPLITS=2, HELD=True), Launch(32, 32)
OTHER_ATTENTION = Attend(16, 32)
FLOAT32_ATTENTION = Attend(16, 16)
"""Of float32 on every GPU: without matrix units its products are unrolled, so a larger tile spills registers."""


def product_name(op: str, rows: int, weight: Tensor) -> str:
    return f"{op} {padded(rows)} {weight.shape[0]}x{weight.shape[1]}"


def attention_name(rows: int) -> str:
    return f"stream_attention {triton.next_power_of_2(rows)}"


def product_launch(op: str, rows: int, weight: Tensor) -> Launch:
    """The launch of a product; rows between 16 and 64 without an entry of their own take that of 64."""
    arch = arch_of(weight.device)
    if arch == "cpu":
        return INTERPRETED_FLOAT32 if weight.dtype is torch.float32 else INTERPRETED_PRODUCT
    if weight.dtype is torch.float32:
        return FLOAT32
    table = launches(arch)
    found = table.get(product_name(op, rows, weight))
    if found is None and rows > 16:
        found = table.get(product_name(op, 64, weight))
    return found if isinstance(found, Launch) else OTHERS


def attention_launch(rows: int, q: Tensor) -> Attend:
    """The launch of attention; other numbers of rows take the entry of the next larger, or of the largest."""
    arch = arch_of(q.device)
    if q.dtype is torch.float32 and arch != "cpu":
        return FLOAT32_ATTENTION
    sizes = {
        int(name.split()[1]) if " " in name else 0: launch
        for name, launch in launches(arch).items()
        if isinstance(launch, Attend)
    }
    if not sizes:
        return OTHER_ATTENTION
    return sizes[min((size for size in sizes if size >= rows), default=max(sizes))]


@cache
def launches(arch: str) -> dict[str, Launch | Attend]:
    """What is launched on an architecture: the entries to begin with, and over them those of the kept table."""
    found = dict(START.get(arch, {}))
    file = TABLES / f"{arch}.json"
    if file.is_file():
        found |= {name: read(name, fields) for name, fields in json.loads(file.read_text())["launches"].items()}
    return found


def read(name: str, fields: dict[str, Any]) -> Launch | Attend:
    """An entry of a kept table. Raises TypeError for fields that it does not have."""
    return Attend(**fields) if name.startswith("stream_attention") else Launch(**fields)


def plain(launch: Launch | Attend) -> Launch | Attend:
    """The same without dependent launch."""
    return replace(launch, pdl=False)
