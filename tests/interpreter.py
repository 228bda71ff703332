"""Triton's interpreter for tests. TRITON_INTERPRET decides when a kernel's file is imported, so what is interpreted has
a process of its own: a test file run as a script, which prints a line of JSON for each point."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import triton
from packaging.version import Version

# Up to 2.3 numpy takes an array of one value for a number, on which older interpreters count in loops.
interprets = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason=f"the interpreter of triton {triton.__version__} needs numpy < 2.4",
)


def lines(script: Path, *words: str, timeout_s: float) -> list[Any]:
    """What a script printed, line by line."""
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def asked(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of this parameter in the tests of the fixture's file that were asked for."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params[name] for item in own if name in item.callspec.params]


def points(kind: str, quick: list[tuple[str, ...]], thorough: list[tuple[str, ...]]) -> list[Any]:
    """Parameters "point" of one kind; the thorough ones are slow."""
    return [
        *(pytest.param((kind, *point), id=" ".join((kind, *point))) for point in quick),
        *(pytest.param((kind, *point), id=" ".join((kind, *point)), marks=pytest.mark.slow) for point in thorough),
    ]


def of_points(request: pytest.FixtureRequest) -> dict[tuple[str, ...], Any]:
    """(kind, *point) -> what came of it, of the points whose tests were asked for."""
    points = [list(point) for point in asked(request, "point")]
    return {tuple(point): found for point, found in lines(request.path, json.dumps(points), timeout_s=2400)}
