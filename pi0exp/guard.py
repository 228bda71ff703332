"""Stands between a command and its parent, so that nothing of the command outlives either of them.

    python -m pi0exp.guard FOLDER COMMAND...

Standard input is a pipe that the parent holds open. When it ends, because the parent closed it or is dead (SIGKILL
included), the command and everything that it started are ended and FOLDER, the parent's scratch, is removed. When the
command ends, what it left running is ended too, and the guard ends as the command did: with its exit code, or by the
same signal.

On Linux processes that left the command's session are found too; elsewhere the parent can only end the session.
"""

import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_S = 5.0
"""How long a process may take to end after SIGTERM."""
_PDEATHSIG, _CHILD_SUBREAPER = 1, 36
"""PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of linux/prctl.h."""


def main(words: list[str]) -> int:
    folder, *command = words
    linux = ctypes.CDLL(None) if sys.platform == "linux" else None
    if linux is not None:
        linux.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become this process's children, wherever they went

    def follow() -> None:
        """In the child: die should the guard be killed."""
        if linux is not None:
            linux.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    # What the parent passed on goes on: the lock of a GPU lasts until the last process of the measurement is gone.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=follow, close_fds=False)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        _ask(child)
        end_descendants()

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end_descendants()
    # Not by the watcher: it would still wait for the child when this thread ends the process.
    if _ended(sys.stdin.fileno()):
        shutil.rmtree(folder, ignore_errors=True)
    if code < 0:
        # Without a second core file, and whatever this process inherited as ignored.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with suppress(OSError, ValueError):  # SIGKILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _ended(pipe: int) -> bool:
    """Whether nobody holds the other end any more. Nothing is ever written there: what can be read is its end."""
    return bool(select.select([pipe], [], [], 0)[0])


def _ask(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and time to heed it."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE_S)


def end_descendants() -> None:
    """SIGKILL to all processes below this one until none is left; a process that the kernel holds gets `GRACE_S`."""
    deadline = time.monotonic() + GRACE_S
    while (left := _descendants()) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.05)
    for process in left:
        print(f"pi0exp.guard: process {process.pid} cannot be ended", flush=True)


def _descendants() -> list[psutil.Process]:
    """Those that still run; the dead ones among them are no more than entries of a table."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
