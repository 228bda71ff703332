"""Did it really run? The names of kernels and runtime calls in a profile of a few calls, against what options promise.

A library may quietly take another path inside; this is the defence against believing it did not.
"""

import re
from collections.abc import Callable, Iterable

import torch

RUNTIME = ("cuda", "hip")
"""Prefixes of the runtime calls (cudaGraphLaunch, hipGraphLaunch) that a profile records beside kernels."""


def profiled_names(call: Callable[[int], None], calls: int) -> set[str]:
    """Names of the GPU kernels and runtime calls of `calls` calls."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for index in range(calls):
            call(index)
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()  # the parsed tree takes minutes for eager runs
    gpu = torch._C._autograd.DeviceType.CUDA
    return {event.name() for event in events if event.device_type() == gpu or event.name().startswith(RUNTIME)}


def unproven(proofs: Iterable[tuple[str, str]], names: set[str]) -> list[str]:
    """One sentence for each promise that no name keeps."""
    return [
        f"{what}: no GPU kernel or runtime call of the profile matches /{pattern}/"
        for what, pattern in proofs
        if not any(re.search(pattern, name) for name in names)
    ]
