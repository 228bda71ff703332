"""Measuring what a GPU reaches: a copy of a gibibyte, and products of 8192 x 8192 matrices in every precision."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch

from pi0exp.ceilings_file import Rate
from pi0exp.errors import UnsupportedError

_COPY_BYTES = 2**30
_SIDE = 8192
_FLOP = 2 * _SIDE**3

COPY = "copy"
RATES = (COPY, "bf16", "fp32", "tf32", "fp8")
"""Bytes per second, read and written, of a copy; FLOP per second of matrix products."""
SUSTAINED_S = 1.0
"""The part of a sustained run that counts, at least: the second half, when a power limit has been felt."""


def measure_rate(kind: str, device: torch.device, seconds: float) -> Rate:
    """Burst and sustained rate. seconds: of bursts. Raises UnsupportedError where this GPU has no such product."""
    with work_of(kind, device) as (call, amount, calls):
        burst = amount / best_seconds(call, device, seconds, calls)
        sustained = amount / sustained_seconds(call, device, max(2 * SUSTAINED_S, seconds), calls)
    # What was reached for long can be reached for a moment, too.
    return Rate(max(burst, sustained), sustained, datetime.now(UTC).isoformat(timespec="seconds"))


def measure_all(device: torch.device, seconds: float, progress: Callable[[str], None]) -> dict[str, Rate]:
    """Every rate that this GPU has."""
    rates = {}
    for kind in RATES:
        if kind != COPY and (reason := lacking(kind, device)):
            progress(f"{kind}: {reason}")
            continue
        progress(f"measure {kind}")
        rates[kind] = measure_rate(kind, device, seconds)
        torch.cuda.empty_cache()
    return rates


@contextmanager
def work_of(kind: str, device: torch.device) -> Iterator[tuple[Callable[[], object], float, int]]:
    """(call, what it moves or computes, calls of a burst); the memory is given back afterwards.

    Random data: zeros multiply faster than any real matrix.
    """
    calls = 4
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        if kind == COPY:
            source = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            yield lambda: target.copy_(source), 2.0 * _COPY_BYTES, 8
            return
        if reason := lacking(kind, device):
            raise UnsupportedError(f"{kind}: {reason}")
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        a, b = (torch.randn(_SIDE, _SIDE, device=device) for _ in range(2))
        if kind == "fp8":
            eight = fp8_dtype()
            a8, b8, one = a.to(eight), b.to(eight).t(), torch.ones((), device=device)
            yield lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16), float(_FLOP), calls
            return
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        a, b = a.to(dtype), b.to(dtype)
        out = torch.empty_like(a)
        yield lambda: torch.mm(a, b, out=out), float(_FLOP), calls
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def fp8_dtype() -> torch.dtype:
    """e4m3 as this vendor's GPUs multiply it: AMD's gfx942 has another bias and no negative zero."""
    arch = torch.cuda.get_device_properties(0).gcnArchName if torch.version.hip else ""
    return torch.float8_e4m3fnuz if "gfx942" in arch else torch.float8_e4m3fn


def lacking(kind: str, device: torch.device) -> str:
    """Why this GPU has no such products; "" where it has."""
    if kind not in RATES:
        return f"no rate has this name; there are {', '.join(RATES)}"
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = facts.gcnArchName.split(":")[0]
        if kind == "tf32":
            return "rounds float32 on NVIDIA GPUs only"
        return "" if kind != "fp8" or arch in ("gfx942", "gfx950") else f"{arch} has none"
    least = {"tf32": (8, 0), "fp8": (8, 9)}.get(kind, (0, 0))
    return "" if (facts.major, facts.minor) >= least else f"sm_{facts.major}{facts.minor} has none"


def best_seconds(call: Callable[[], object], device: torch.device, budget_s: float, calls: int) -> float:
    """Seconds of one call in the fastest burst of `calls`."""
    for _ in range(2):
        call()
    torch.cuda.synchronize(device)
    best, end = float("inf"), time.perf_counter() + budget_s
    while best == float("inf") or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3 / calls)
        time.sleep(0.05)  # lets the clock recover between bursts
    return best


def sustained_seconds(call: Callable[[], object], device: torch.device, budget_s: float, calls: int) -> float:
    """Seconds of one call in the second half of a run without a gap."""
    marks: list[Any] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    mark()
    end = time.perf_counter() + budget_s
    while len(marks) < 3 or time.perf_counter() < end:
        for _ in range(calls):
            call()
        mark()
        marks[-2].synchronize()  # one burst is always waiting, so that the GPU never does
    torch.cuda.synchronize(device)
    middle = len(marks) // 2
    elapsed_ms: float = marks[middle].elapsed_time(marks[-1])
    return elapsed_ms / 1e3 / (calls * (len(marks) - 1 - middle))
