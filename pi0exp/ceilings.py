"""What this GPU reaches on a large copy and a large matrix product, measured in short bursts from a rested clock."""

import time
from collections.abc import Callable

import torch

from pi0exp.roofline import Ceilings

_COPY_BYTES = 2**30
_SIDE = 8192


def burst_ceilings(dtype: torch.dtype, device: torch.device, seconds: float) -> Ceilings:
    """The best of as many bursts as fit into `seconds`, half of them copies, half products of 8192 x 8192 matrices.

    Bursts, not a sustained run: this is the limit that no call may pass, not the rate a power cap allows for long.
    Random data: zeros multiply faster than any real matrix.
    """
    source = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = _best_seconds(lambda: target.copy_(source), device, seconds / 2, calls=8)
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    products = _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds / 2, calls=4)
    return Ceilings(bytes_per_s=2 * _COPY_BYTES / copies, flops_per_s=2 * _SIDE**3 / products)


def _best_seconds(call: Callable[[], object], device: torch.device, budget_s: float, calls: int) -> float:
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
