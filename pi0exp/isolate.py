"""Run `pi0exp.measure` in a process of its own, follow it, and bring home its result whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pi0exp.errors import UserError
from pi0exp.machine import child_environment
from pi0exp.measure import PROGRESS
from pi0exp.result import CONFIG_ERROR, Outcome, Result

LOG_LINES, LINE_CHARACTERS = 200, 2000
"""How much of the child's output is kept: enough for a traceback, however much it prints."""
GRACE_S = 5.0


def measure_isolated(plain: dict[str, Any], timeout_s: float, progress: Callable[[str], None]) -> Result:
    """The child's `Result`; a child that dies, hangs or says nothing becomes one too.

    Raises UserError where the child could not read the configuration or an input, and KeyboardInterrupt after stopping
    the child and all that it started.
    """
    with tempfile.TemporaryDirectory(prefix="pi0exp-") as scratch:
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
        try:
            code = child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(child)
            return Result(Outcome.TIMEOUT, [f"no result after {timeout_s:g} s (measure.timeout_s)"], log="".join(log))
        except BaseException:
            _end(child)
            raise
        reader.join(GRACE_S)
        return _result(code, target, "".join(log))


def _follow(stream: IO[str], log: deque[str], progress: Callable[[str], None]) -> None:
    """Sort the child's lines: what it is doing goes to `progress`, the rest to `log`."""
    while line := stream.readline(LINE_CHARACTERS):
        if line.startswith(PROGRESS):
            progress(line.removeprefix(PROGRESS).rstrip("\n"))
        else:
            log.append(line)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop the child and its group, first politely."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=GRACE_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _result(code: int, target: Path, log: str) -> Result:
    if code == CONFIG_ERROR and not target.exists():
        lines = [line for line in log.splitlines() if line.startswith("pi0exp.measure: ")]
        raise UserError(
            lines[-1].removeprefix("pi0exp.measure: ") if lines else "the measuring process refused its input"
        )
    if target.exists():
        try:
            values = json.loads(target.read_text())
            kept = values | {"log": "" if values["outcome"] == Outcome.OK else log}
            return Result(**kept)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            return Result(
                Outcome.ERROR, [f"the measuring process wrote a result that cannot be read: {error}"], log=log
            )
    if code == -signal.SIGKILL:
        return Result(
            Outcome.ERROR, ["the measuring process was killed (SIGKILL); out of memory on the host, perhaps"], log=log
        )
    if code < 0:
        return Result(Outcome.ERROR, [f"the measuring process died of {signal.Signals(-code).name}"], log=log)
    return Result(Outcome.ERROR, [f"the measuring process ended with code {code} and no result"], log=log)
