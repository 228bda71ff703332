"""One profile of a few calls: the kernels that prove the options, and where their time goes.

Recorded into one Chrome trace: first, where the calls replay graphs, the same call with its kernels launched one by one
(range pi0exp.launched), then the calls as they are timed (ranges pi0exp.call). The breakdown is read from that file, so
whoever has the file has the same figures: python -m pi0exp.breakdown trace.json.gz
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from pi0exp.slices import Ceilings, Trace
from pi0exp.subject import Instance
from pi0exp.traces import CALL_RANGE, CEILINGS, LAUNCHED_RANGE, STAGE_RANGE, parse_trace

TRACE = "trace.json.gz"
"""The name of the file of a run."""


NAMES = {"bf16": "BFloat16", "fp32": "float", "tf32": "float", "fp8": "Float8_e4m3fn"}
"""What the profiler calls the types of products, by the names of `pi0exp.rates`."""


def profile(instance: Instance, calls: int, ceilings: Ceilings | None, path: Path) -> Trace:
    """The profile of `calls` calls, written to `path`, which ends in .json.gz.

    Shapes of operations are recorded: that slows down calls that launch their kernels one by one, on the host alone.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    launched = launchable(instance)
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        if ceilings is not None:
            recorded.add_metadata_json(CEILINGS, json.dumps(asdict(ceilings)))
        if launched:
            with record_function(LAUNCHED_RANGE):
                call_launched(instance)
        with instance.watched(stage_range) or nullcontext():
            for index in range(calls):
                with record_function(CALL_RANGE):
                    instance.call(index)
        synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    return parse_trace(path)


def launchable(instance: Instance) -> bool:
    """Whether calls replay graphs, and one with its kernels launched one by one has run.

    So what only the first such call does (workspaces, algorithms) stays out of the profile. It needs memory beside that
    of the graphs; without it the stages are not told apart, and everything else is still profiled.
    """
    if instance.launched(stage_range) is None:
        return False
    try:
        call_launched(instance)
    except torch.OutOfMemoryError:
        return False
    return True


def call_launched(instance: Instance) -> None:
    """One call, its kernels launched one by one, its stages in ranges; returns when the device is done."""
    with instance.launched(stage_range) or nullcontext():
        instance.call(0)
    synchronize()


def stage_range(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in the range of its stage."""

    def ranged(*args: Any, **named: Any) -> Any:
        with record_function(STAGE_RANGE + stage):
            return function(*args, **named)

    return ranged


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
