"""`python -m pi0exp WORDS` for whole studies on any machine: every point in this process, one after the other.

    python tests/whole_study.py study=ladder model=tiny measure=quick

Everything is the program's own but for what takes a GPU or minutes: a graph runs its function again, `torch.compile`
traces and generates no code, and no point has a process of its own.
"""

import json
import sys
from typing import Any

import torch
from helpers import PretendedGraph

from pi0exp import measure, point
from pi0exp.__main__ import main
from pi0exp.graphs import capture
from pi0exp.option import Requires
from pi0exp.result import Result

COMPILE = torch.compile


def traced(function: Any, options: Any = None, **rest: Any) -> Any:
    """For torch.compile."""
    return COMPILE(function, backend="eager", **rest)


def measure_here(plain: dict[str, Any], *_: Any, **__: Any) -> Result:
    """For pi0exp.isolate.measure_isolated; what goes in and comes out passes through files there."""
    torch._dynamo.reset()
    made = measure.guarded(json.loads(json.dumps(plain)))
    return Result(**json.loads(json.dumps(made.to_dict())))


if __name__ == "__main__":
    torch.compile = traced
    capture.Graph = PretendedGraph  # type: ignore[misc, assignment]
    capture.Capture.requires = Requires()
    point.measure_isolated = measure_here
    sys.exit(main())
