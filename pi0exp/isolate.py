"""Run `pi0exp.measure` in a process of its own, follow it, and bring home its result whatever happens to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pi0exp import interrupts
from pi0exp.errors import UserError
from pi0exp.machine import child_environment
from pi0exp.measure import PROGRESS
from pi0exp.result import CONFIG_ERROR, Outcome, Result

LOG_LINES, LINE_CHARACTERS = 200, 2000
"""How much of the child's output is kept: enough for a traceback, however much it prints."""
GRACE_S = 5.0
_REFUSAL = "pi0exp.measure: "
"""Starts the line in which the child says what is wrong with its input."""


def measure_isolated(
    plain: dict[str, Any], timeout_s: float, progress: Callable[[str], None], keep: Path | None = None
) -> Result:
    """The child's `Result`; a child that dies, hangs or says nothing becomes one too.

    keep: a folder that receives what the child left beside its result (the profiler's trace).

    Raises UserError where the child could not read the configuration or an input, and KeyboardInterrupt. Whatever
    happens, neither the child nor anything that it started is left.
    """
    with interrupts.held(), tempfile.TemporaryDirectory(prefix="pi0exp-") as scratch:
        source, target = Path(scratch, "experiment.json"), Path(scratch, "result.json")
        source.write_text(json.dumps(plain))
        child = subprocess.Popen(
            [sys.executable, "-m", "pi0exp.measure", str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child's whole group
        )
        assert child.stdout is not None
        log: deque[str] = deque(maxlen=LOG_LINES)
        reader = threading.Thread(target=_follow, args=(child.stdout, log, progress), daemon=True)
        reader.start()
        code = None
        try:
            with interrupts.allowed(), suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=timeout_s)
        finally:
            _end(child)
            reader.join(GRACE_S)
        left = target.with_suffix(".files")
        if keep is not None and left.is_dir() and target.exists():  # without a result they may be torn
            shutil.copytree(left, keep, dirs_exist_ok=True)
        text = "".join(list(log))
        if code is None:
            return Result(Outcome.TIMEOUT, [f"no result after {timeout_s:g} s (measure.timeout_s)"], log=text)
        return _result(code, target, text)


def _follow(stream: IO[str], log: deque[str], progress: Callable[[str], None]) -> None:
    """Sort the child's lines: what it is doing goes to `progress`, the rest to `log`."""
    with stream:
        while line := stream.readline(LINE_CHARACTERS):
            if line.startswith(PROGRESS):
                progress(line.removeprefix(PROGRESS).rstrip("\n"))
            else:
                log.append(line)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop the child, first politely, and then whatever it started and left behind."""
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE_S)
    _signal(child, signal.SIGKILL)
    child.wait()


def _signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the child's whole group, which may be there when the child is gone."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _result(code: int, target: Path, log: str) -> Result:
    if target.exists():
        try:
            values = json.loads(target.read_text())
            kept = values | {"log": "" if values["outcome"] == Outcome.OK else log}
            return Result(**kept)
        except (KeyError, TypeError, ValueError) as error:
            return Result(
                Outcome.ERROR, [f"the measuring process wrote a result that cannot be read: {error}"], log=log
            )
    if code == CONFIG_ERROR and (lines := [line for line in log.splitlines() if line.startswith(_REFUSAL)]):
        raise UserError(lines[-1].removeprefix(_REFUSAL))
    if code == -signal.SIGKILL:
        reason = "the measuring process was killed (SIGKILL); out of memory on the host, perhaps"
    elif code < 0:
        reason = f"the measuring process died of {signal.Signals(-code).name}"
    else:
        reason = f"the measuring process ended with code {code} and no result"
    return Result(Outcome.ERROR, [reason], log=log)
