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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from pi0exp import causes, gpu_lock, interrupts
from pi0exp.errors import UserError
from pi0exp.machine import child_environment, this_machine
from pi0exp.measure import PROGRESS, fingerprint
from pi0exp.phases import Phases
from pi0exp.result import CONFIG_ERROR, Outcome, Result

LOG_LINES, LINE_BYTES = 200, 2000
"""How much of the child's output is kept: enough for a traceback, however much it prints. None of it goes to a disk."""
RESULT_BYTES = 1 << 28
"""The largest result that is read. A thousand samples are 20 kB, a profiler's trace some MB."""
CHILD = "pi0exp.measure"
"""The module that measures."""
END_S = 15.0
"""How long the guard may take to end the child and what it started: its time for a polite end, twice, and some more."""


def measure_isolated(
    plain: dict[str, Any],
    timeout_s: float,
    progress: Callable[[str], None],
    keep: Path | None = None,
    module: str | None = None,
    on_gpu: bool = False,
) -> Result:
    """The child's `Result`, with `wall_s/` where it is ok; a child that dies, hangs or says nothing becomes one too.

    keep: a folder that receives what the child left beside its result (the profiler's trace). module: the command that
    reads `plain` and writes a Result; None for that which measures one point. on_gpu: it gets a GPU for itself alone;
    a wait for one does not count as its time.

    Raises UserError where the child could not read the configuration or an input, and KeyboardInterrupt. Whatever
    happens, neither the child nor anything that it started is left, not even if this process is killed
    (pi0exp.guard).
    """
    with (
        interrupts.held(),
        tempfile.TemporaryDirectory(prefix="pi0exp-") as scratch,
        gpu_lock.taken(on_gpu, progress) as gpu,
    ):
        source, target = Path(scratch, "experiment.json"), Path(scratch, "result.json")
        source.write_text(json.dumps(plain))
        kills, module = causes.host_kills(), module or CHILD
        phases = Phases(progress)
        guard = subprocess.Popen(
            [sys.executable, "-m", "pi0exp.guard", scratch, sys.executable, "-m", module, str(source), str(target)],
            stdin=subprocess.PIPE,  # the guard ends the child when this closes, which it also does when we die
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(gpu.environment),
            pass_fds=gpu.descriptors,  # while any process of the measurement is left, its GPU is taken
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        assert guard.stdout is not None
        log: deque[bytes] = deque(maxlen=LOG_LINES)
        reader = threading.Thread(target=_follow, args=(guard.stdout, log, phases), daemon=True)
        reader.start()
        code = None
        try:
            with interrupts.allowed(), suppress(subprocess.TimeoutExpired):
                code = guard.wait(timeout=timeout_s)
        finally:
            _end(guard)
            reader.join(END_S)
        left = target.with_suffix(".files")
        if keep is not None and left.is_dir() and target.exists():  # without a result they may be torn
            shutil.copytree(left, keep, dirs_exist_ok=True)
        text = b"".join(list(log)).decode(errors="replace")
        if code is None:
            result = Result(Outcome.TIMEOUT, [f"no result after {timeout_s:g} s (measure.timeout_s)"], log=text)
        else:
            killed = kills is not None and causes.host_kills() != kills
            result = _result(code, target, text, module, host_killed=killed)
        if result.outcome is Outcome.OK:
            result = replace(result, metrics=result.metrics | phases.metrics())
        if gpu.uuid and not result.fingerprint:  # a child that died could not say where it was
            result = replace(result, fingerprint=fingerprint(this_machine(), gpu.uuid))
        return result


def _follow(stream: IO[bytes], log: deque[bytes], progress: Callable[[str], None]) -> None:
    """Sort the child's lines: what it is doing goes to `progress`, the rest to `log`. A gigabyte takes seconds."""
    mark, rest = PROGRESS.encode(), b""
    with stream:
        while block := os.read(stream.fileno(), 1 << 16):
            *lines, rest = (rest + block).split(b"\n")
            for line in filter(lambda line: line.startswith(mark), lines):
                with suppress(OSError):  # nobody listens any more; the measurement goes on
                    progress(line.removeprefix(mark).decode(errors="replace"))
            log.extend(_pieces([line for line in lines[-LOG_LINES:] if not line.startswith(mark)]))
            if len(rest) > LINE_BYTES:
                log.extend(_pieces([rest], end=b""))
                rest = b""
        log.extend(_pieces([rest] if rest else []))


def _pieces(lines: list[bytes], end: bytes = b"\n") -> Iterator[bytes]:
    """The lines, overlong ones in several parts."""
    for line in lines:
        whole = line + end
        yield from (whole[start : start + LINE_BYTES] for start in range(0, len(whole), LINE_BYTES))


def _end(guard: subprocess.Popen[bytes]) -> None:
    """Let the guard stop the child and whatever it started, and make sure of it should the guard itself be gone."""
    assert guard.stdin is not None
    with suppress(BrokenPipeError):
        guard.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        guard.wait(timeout=END_S)
    with suppress(ProcessLookupError):
        os.killpg(guard.pid, signal.SIGKILL)
    guard.wait()


def _result(code: int, target: Path, log: str, module: str, host_killed: bool) -> Result:
    """code: as subprocess tells it, negative for a signal. host_killed: whether Linux killed for want of memory."""
    outcome, reason = _death(code, log, host_killed)
    if target.exists():
        try:
            if (size := target.stat().st_size) > RESULT_BYTES:
                raise ValueError(f"{size} bytes are more than the {RESULT_BYTES} that are read")
            values = json.loads(target.read_text())
            result = Result(**values | {"log": "" if values["outcome"] == Outcome.OK else log})
        except (KeyError, TypeError, ValueError) as error:
            return Result(
                Outcome.ERROR, [f"the measuring process wrote a result that cannot be read: {error}"], log=log
            )
        if result.outcome is Outcome.OK and code != Outcome.OK.exit_code:
            # Whatever broke it may have been broken when it measured.
            return Result(outcome, [f"{reason}, after it had written that it was ok"], log=log)
        return result
    refusal = f"{module}: "  # starts the line in which the child says what is wrong with its input
    if code == CONFIG_ERROR and (lines := [line for line in log.splitlines() if line.startswith(refusal)]):
        raise UserError(lines[-1].removeprefix(refusal))
    return Result(outcome, [reason if code < 0 else f"{reason} and no result"], log=log)


def _death(code: int, log: str, host_killed: bool) -> tuple[Outcome, str]:
    """How a process ended, and why as far as can be told from its log."""
    if code == -signal.SIGKILL:
        if host_killed:
            return Outcome.OOM, "the measuring process was killed: the host ran out of memory"
        return Outcome.ERROR, "the measuring process was killed (SIGKILL)"
    memory, cause = causes.of_death(log)
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    reason = ": ".join(filter(None, [f"the measuring process {how}", cause]))
    return Outcome.OOM if memory else Outcome.ERROR, reason
