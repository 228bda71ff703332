"""A sweep of 20 points whose command is killed at random moments:  python killed_sweep.py ROOT STUDY KILLS SEED

Each start is `python -m pi0exp -m ...` in a process of its own that was forked when everything was imported: starting
it anew would take seconds, and most signals would meet imports. The child is tests/noop_child.py. A sweep that is
complete is followed by another one, until there were KILLS kills of commands that still had something to do. Prints as
JSON, a line each: what a start did, and at the end the sweeps.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra.core.global_hydra  # noqa: F401
import kept
import mlflow.store.tracking.sqlalchemy_store
from cli import TOY, processes, run_here

import pi0exp.explain  # noqa: F401
from pi0exp import __main__ as command
from pi0exp import isolate, point
from pi0exp.backend import import_mlflow
from pi0exp.key import source_digest
from pi0exp.track import Store

POINTS = 20
LIFE_S = 1.0
"""From the first point on a start lives at most so long when it is to be killed: a point or two."""
AT_WORK = 0.8
"""Share of the kills whose clock begins with the first point; that of the others begins with the process."""


def main(root: Path, study: str, kills: int, seed: int) -> None:
    chance, done, sweeps = random.Random(seed), 0, 0
    import_mlflow()
    isolate.CHILD = "noop_child"
    source_digest()  # one code for all starts, whatever is edited meanwhile
    Store.open(None, root / "mlruns")  # once, in seconds; what a kill leaves of it is another test's
    kept.keep_configurations()
    while done < kills:
        sweeps += 1
        words = sweep(root, f"{study}_{sweeps}")
        compose_once(words)
        mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore._engine_map.clear()  # a fork must not share connections
        while done < kills:
            pid, first_point = start(words)
            if chance.random() < AT_WORK:
                os.read(first_point, 1)  # or the end of a command that found nothing to do
            os.close(first_point)
            time.sleep(chance.uniform(0, LIFE_S))
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0, status
                break  # the sweep is complete
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            print(
                json.dumps({"killed": pid, "sweep": sweeps, "gone_after_s": gone(root), "runs": tally(root)}),
                flush=True,
            )
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(start(words)[0], 0)[1])
        print(
            json.dumps({"completed": sweeps, "code": code, "took_s": time.monotonic() - began, "runs": tally(root)}),
            flush=True,
        )


def sweep(root: Path, study: str) -> list[str]:
    points = ",".join(f"toy{i}" for i in range(POINTS))
    return [*TOY, f"track.root={root}/mlruns", f"name={study}", "-m", f"+subject.fault={points}"]


def compose_once(words: list[str]) -> None:
    """What would take each start of this sweep seconds: the composition of its points. Nothing is measured."""
    made = {"outcome": "ok", "reasons": [], "exit_code": 0}
    with (
        patch.object(command, "point", lambda plain: made),
        open(os.devnull, "w") as sink,
        redirect_stdout(sink),
        redirect_stderr(sink),
    ):
        assert run_here(words) == 0


def start(words: list[str]) -> tuple[int, int]:
    """Fork a command: its process id, and a pipe that says when its first point begins to be measured."""
    told, tell = os.pipe()
    if pid := os.fork():
        os.close(tell)
        return pid, told
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    isolated = point.measure_isolated

    def measure(*given: Any, **named: Any) -> Any:
        with suppress(BrokenPipeError):  # nobody listens after the first
            os.write(tell, b".")
        return isolated(*given, **named)

    point.measure_isolated = measure
    os._exit(run_here(words))


def tally(root: Path) -> dict[str, int]:
    """Outcome -> how many runs have it, of all sweeps."""
    file = root / "mlruns" / "mlflow.db"
    if not file.exists():
        return {}
    with closing(sqlite3.connect(file, timeout=20)) as connection:
        return dict(connection.execute("SELECT value, count(*) FROM tags WHERE key = 'outcome' GROUP BY value"))


def gone(root: Path) -> float:
    """Seconds until no process below the command is left; an error if that takes ten."""
    began = time.monotonic()
    while left := processes(root / "tmp" / "pi0exp-"):
        assert time.monotonic() - began < 10, left
        time.sleep(0.01)
    return round(time.monotonic() - began, 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
