"""`python -m pi0exp WORDS` for whole studies on any machine: every point in one process, one after the other.

    python tests/whole_study.py < LINES

Each line of standard input is a JSON list [file for stdout, file for stderr, word, ...]: a fork runs the words, and a
line with its exit code answers. So libraries are imported once. Everything is the program's own but for what takes a
GPU or minutes: a graph runs its function again, `torch.compile` traces and generates no code, and no point has a
process of its own.
"""

import gc
import json
import os
import sys
import traceback
from typing import Any

import hydra.core.global_hydra  # noqa: F401
import kept
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch
import torch._dynamo
from cli import run_here
from helpers import PretendedGraph, traced

from pi0exp import compose, measure, point
from pi0exp.backend import import_mlflow
from pi0exp.graphs import capture
from pi0exp.option import Requires
from pi0exp.result import Result


def measure_here(plain: dict[str, Any], *_: Any, **__: Any) -> Result:
    """For pi0exp.isolate.measure_isolated; what goes in and comes out passes through files there."""
    torch._dynamo.reset()
    made = measure.guarded(json.loads(json.dumps(plain)))
    return Result(**json.loads(json.dumps(made.to_dict())))


def serve() -> None:
    import_mlflow()
    compose.from_words(["model=tiny"])
    gc.freeze()  # what is imported is no garbage, and each verification collects some
    for line in sys.stdin:
        out, err, *words = json.loads(line)
        if (pid := os.fork()) == 0:
            for number, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = 1
            try:
                code = run_here(words)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.compile = traced
    capture.Graph = PretendedGraph  # type: ignore[misc, assignment]
    capture.Capture.requires = Requires()
    point.measure_isolated = measure_here
    kept.keep_files_and_tables()
    kept.keep_configurations()
    serve()
