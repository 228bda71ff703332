"""Every fault that the suite injects, and what must come of it:  python tests/faults.py --write docs/faults.md

`make faults` runs the suite, which holds each row to what it sees, and then writes the table.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pi0exp.result import CONFIG_ERROR, Outcome

RUN = "the run: reason, end of the log"
SHORT = "the run: reason"
FILE = "a file beside the store"
TEMPORARY = "a file on the disk of temporary files"
AGAIN, SETTLED, IMPORTS = "measures it again", "finds it settled", "brings the file in, finds it settled"
REFUSED = "refused"
TINY, SWEEP, PARENT, STORE = "the tiny model, in a sweep", "the frame, in a sweep", "the command", "the store"


@dataclass(frozen=True)
class Fault:
    """One row. name: of what injects it. reason: what the outcome's reason, or the line on stderr, must hold."""

    name: str
    what: str
    where: str
    outcome: str
    reason: str
    kept: str
    after: str

    @property
    def code(self) -> int:
        return CONFIG_ERROR if self.outcome == REFUSED else Outcome(self.outcome).exit_code


def _tiny(name: str, what: str, outcome: str, reason: str) -> Fault:
    ok = outcome == "ok"
    return Fault(name, what, TINY, outcome, reason, "the run, its samples" if ok else RUN, SETTLED if ok else AGAIN)


def _lost(name: str, what: str, reason: str, kept: str = FILE) -> Fault:
    return Fault(name, f"{what} while a point is measured", STORE, "ok", reason, kept, IMPORTS)


def _no_store(name: str, what: str, reason: str) -> Fault:
    return Fault(name, f"{what} before the start", STORE, REFUSED, reason, "nothing; nothing was measured", AGAIN)


FAULTS = (
    _tiny("exception", "an option raises", "error", "RuntimeError: the option broke"),
    _tiny("late_exception", "a timed call raises", "error", "it broke while it was timed"),
    _tiny("not_finite", "the actions are NaN", "wrong_numerics", "the actions are not finite"),
    _tiny("late_not_finite", "the actions become NaN while they are timed", "wrong_numerics", "after it was timed"),
    _tiny("wrong", "the actions are others", "wrong_numerics", "declared EXACT"),
    _tiny("segv", "segmentation fault", "error", "died of SIGSEGV"),
    _tiny("cuda_abort", "abort with the last words of a CUDA error", "error", "SIGABRT: CUDA error: an illegal memory"),
    _tiny("killed", "SIGKILL", "error", "was killed (SIGKILL)"),
    _tiny("silent", "exit code 0 and no result", "error", "ended with code 0 and no result"),
    _tiny("half", "half a result file", "error", "wrote a result that cannot be read"),
    _tiny("forged", "a result that is `ok` and has no latency", "error", "must carry latency_ms/p50"),
    _tiny("liar", "a result that is `ok`, then a segmentation fault", "error", "after it had written that it was ok"),
    _tiny("loud", "a gigabyte of output, then an exception", "error", "RuntimeError: hoarse"),
    _tiny("device_oom", "torch.OutOfMemoryError", "oom", "CUDA out of memory"),
    _tiny("host_oom", "no memory on the host (a real limit)", "oom", "can't allocate memory"),
    _tiny("orphan", "a process left behind in a session of its own", "ok", ""),
    Fault("hang", "no end, deaf to SIGTERM, with a deaf child", SWEEP, "timeout", "no result after", RUN, AGAIN),
    Fault("SIGINT", "Ctrl-C while a point is measured", PARENT, "interrupted", "stopped by Ctrl-C", SHORT, AGAIN),
    Fault("SIGTERM", "SIGTERM while a point is measured", PARENT, "interrupted", "stopped by SIGTERM", SHORT, AGAIN),
    Fault("SIGHUP", "SIGHUP while a point is measured", PARENT, "interrupted", "stopped by SIGHUP", SHORT, AGAIN),
    Fault("SIGKILL", "SIGKILL at 50 random moments", PARENT, "interrupted", "was killed or died", SHORT, AGAIN),
    _no_store("no_folder", "a file in the place of the folder", "is a file where a folder must be"),
    _no_store("full_before", "the disk is full", "No space left on device"),
    _no_store("read_only_before", "the disk is read-only", "Read-only file system"),
    _lost("deleted", "the store is deleted", "deleted or replaced"),
    _lost("no_artifacts", "a file takes the place of the artifacts' folder", "Not a directory"),
    _lost("locked", "another process locks the database", "locked"),
    _lost("full", "the disk fills up", "No space left on device"),
    _lost("read_only", "the disk becomes read-only", "Read-only file system", TEMPORARY),
)  # fmt: skip


def by_name(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def table() -> str:
    """docs/faults.md."""
    rows = [
        f"| {fault.what} | {fault.where} | `{fault.outcome}` | {_code(fault)} | {fault.kept} | {fault.after} |"
        for fault in FAULTS
    ]
    return "\n".join([_HEAD, *rows, _FOOT])


def _code(fault: Fault) -> str:
    return "-9, by the signal" if fault.name == "SIGKILL" else str(fault.code)


_HEAD = """# Faults are results

What comes of whatever goes wrong. `make faults` injects each of these faults, holds every row to what it saw, and
writes this table. After each of them no process is left, the other points of the sweep are measured, and no broken run
is `ok`. The exit code is that of the point alone; a sweep ends with the largest of its points',
`unsupported` left out.

| fault | injected into | outcome | exit code | what is kept | what the next start does |
| --- | --- | --- | ---: | --- | --- |"""

_FOOT = """
* **The measuring process** has a guard (`pi0exp/guard.py`) that ends it, and whatever it started, when the command
  ends, by SIGKILL too. Its output goes through a pipe: the last 200 lines are kept with the run, nothing on a disk.
* **Memory**: `torch.OutOfMemoryError`, and the words of CUDA, HIP, cuBLAS and the host's allocator for the same, are
  `oom`; a process that Linux killed for want of memory is too, told by `oom_kill` of `/proc/vmstat`.
* **A GPU that is listed but cannot be opened** (CUDA does not start, the driver is too old for this torch) is `error`,
  with torch's own words: it is measured again once that is repaired. `unsupported` would be settled.
* **The store**: a result is written to `.spool/` in the folder of the store before it is logged, and removed
  afterwards; for a server that folder is in the local `mlruns/`. 1 MiB of the disk is kept free for it while a point
  is measured. Where even that disk takes nothing, it goes to `pi0exp-spool-UID/` among the temporary files. One line
  says where a result waits.
* **Runs of a command that was killed** are marked `interrupted` when the study is next started or loaded, once the
  results that wait are in; one that comes later still makes its run whole. The run carries host, start of the host,
  process id, start of the process and a digest of `/etc/machine-id` (tag `owner`); runs of a process that still runs
  are left alone, and so are those of other hosts and other containers, where this cannot be known. A host that was
  started anew is told from another one of its name by that digest; without one its runs stay as they are.
* **A sweep** ends with a line that says whether the study is complete, or which points are missing. The same command
  measures only those, also after Ctrl-C; `measure=explain` asks without measuring, and answers for each `measure=` that
  points were measured with. `resume=false` measures all of them anew.

What is not injected here: errors of a real GPU, which `tests/test_faults_gpu.py` has for a machine with one, and a
kill by Linux for want of memory, which is tested with a count that is made up.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.write is None:
        print(table())
    else:
        given.write.write_text(table())


if __name__ == "__main__":
    main()
