"""What `tune` tries: for each launch of a denoising step what fits the GPU, about a wave of programs first."""

from collections.abc import Sequence
from itertools import product

from pi0exp.kernels import stream_launch
from pi0exp.kernels.skinny_gemm import Launch
from pi0exp.kernels.stream_launch import Attend

WIDTH, HIDDEN, HEADS, HEAD_DIM = 1024, 4096, 8, 256
"""Of Pi0's expert."""
SIZES = {16: (10, 788), 64: (50, 968)}
"""Padded rows -> tokens of a step, and tokens of the prefix behind which they stand."""
MOST = 28
"""Candidates of a name."""
SHARED_BYTES, HELD_BYTES = 200_000, 512 * 32
"""Above these, Triton finds no room: shared memory of a program, and bytes of registers a warp for a held weight."""


def names(rows: int) -> dict[str, tuple[int, int]]:
    """Name in the table -> rows and columns of the weight; none for attention."""
    qkv = (HEADS + 2) * HEAD_DIM
    shapes = {
        "stream_qkv": (qkv, WIDTH),
        "stream_gated": (2 * HIDDEN, WIDTH),
        "out": (WIDTH, HEADS * HEAD_DIM),
        "down": (WIDTH, HIDDEN),
    }
    found = {
        f"{'stream_residual' if op in ('out', 'down') else op} {rows} {C}x{K}": (C, K) for op, (C, K) in shapes.items()
    }
    return found | {stream_launch.attention_name(SIZES[rows][0] * HEADS): (0, 0)}


def candidates(rows: int, name: str) -> list[Launch | Attend]:
    """What is tried, the launch to begin with first."""
    C, K = names(rows)[name]
    found = _attends(rows) if not C else _launches(rows, C, K, gated=name.startswith("stream_gated"))
    start = stream_launch.START["sm_90"].get(name)
    return [start, *(one for one in found if one != start)] if start else found


def _attends(rows: int) -> list[Launch | Attend]:
    tall = (16, 32) if rows == 16 else (16, 32, 64)
    found = [
        Attend(BM, BN, COLUMNS=columns, HELD=held, num_warps=warps)
        for BM, BN, columns, held, warps in product(tall, (32, 64, 128), (1, 2, 4), (True, False), (4, 8))
        if not held or BN * HEAD_DIM * 2 * (1 + 1 / columns) <= HELD_BYTES * warps
    ]
    return _spread(found)


def _launches(rows: int, C: int, K: int, gated: bool) -> list[Launch | Attend]:
    """Held launches for few rows, streamed ones with x on the left for many; both where both have been fast."""
    held = [
        Launch(R // 2 if gated else R, BK, GROUPS=groups, SPLITS=splits, HELD=True, X_LEFT=left, num_warps=warps)
        for R, BK, groups, splits, left, warps in product(
            (32, 64, 128), (128, 256), (1, 4), (1, 2, 4, 8, 16), (False, True), (2, 4, 8)
        )
        if not (left and groups > 1)
    ]
    streams = [
        Launch(R // 2 if gated else R, BK, SPLITS=splits, X_LEFT=left, num_warps=4, num_stages=stages)
        for R, BK, splits, left, stages in product(
            (16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (True, False), (4, 6)
        )
    ]  # fmt: skip
    found = [one for one in (held if rows == 16 else streams + held) if _fits(one, rows, C, K, gated)]
    # About one wave of programs first; the list is cut there.
    found.sort(key=lambda one: not 100 <= C // (one.BN * (2 if gated else 1)) * one.SPLITS <= 540)
    return _spread(found[: 4 * MOST])


def _spread(found: Sequence[Launch | Attend]) -> list[Launch | Attend]:
    """At most MOST of them, evenly from first to last."""
    return [found[i * len(found) // min(MOST, len(found))] for i in range(min(MOST, len(found)))]


def _fits(launch: Launch, rows: int, C: int, K: int, gated: bool) -> bool:
    """Whether it divides K, fits into the GPU, and has enough programs."""
    R, chunk = launch.BN * (2 if gated else 1), launch.GROUPS * launch.BK
    if launch.BN < 16 or K % (chunk * launch.SPLITS) or not 60 <= C // R * launch.SPLITS <= 1100:
        return False
    steps = K // (chunk * launch.SPLITS)
    if launch.HELD:
        weight = 2 * R * chunk * steps
        return weight <= HELD_BYTES * launch.num_warps and weight + 2 * rows * chunk * steps <= SHARED_BYTES
    return steps >= 2 and launch.num_stages * 2 * (R + rows) * chunk <= SHARED_BYTES
