"""An option that breaks the measurement of a policy in the way that its setting says.

    graphs._target_=fault_options.Faulty +graphs.fault=segv +graphs.marks=FOLDER

Each fault happens once: FOLDER remembers it, so that the next run of the same point shows what is left of it.
"""

import atexit
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi0exp.option import Option
from pi0exp.policy import Policy
from pi0exp.result import Outcome, Result

TIMED_CALL = 13
"""With the settings of tests/cli.py: 9 calls verify, 2 warm up, the 13th is the second that is timed."""
GIGABYTE = 10**9


@dataclass(frozen=True)
class Faulty(Option):
    fault: str = "none"
    marks: str = ""

    def apply(self, policy: Policy) -> None:
        mark = Path(self.marks, self.fault)
        if mark.exists():
            return
        mark.touch()
        print(f"about to {self.fault}", flush=True)
        self.known[self.fault](policy)

    @property
    def known(self) -> dict[str, Callable[[Policy], None]]:
        return FAULTS


def at_call(policy: Policy, number: int, fault: Callable[[Any], Any]) -> None:
    """Pass the actions of one call through `fault`."""
    calls = 0

    def wrapper(inner: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            return fault(inner(*given)) if calls >= number else inner(*given)

        return call

    policy.wrap_call(wrapper, "a fault")


def raises(error: Exception) -> Any:
    raise error


def no_fault(policy: Policy) -> None:
    pass


def exception(policy: Policy) -> None:
    raise RuntimeError("the option broke\nin two")


def late_exception(policy: Policy) -> None:
    at_call(policy, TIMED_CALL, lambda actions: raises(RuntimeError("it broke while it was timed")))


def not_finite(policy: Policy) -> None:
    at_call(policy, 1, lambda actions: actions * float("nan"))


def late_not_finite(policy: Policy) -> None:
    at_call(policy, TIMED_CALL, lambda actions: actions * float("nan"))


def wrong(policy: Policy) -> None:
    at_call(policy, 1, lambda actions: actions + 1)


def segv(policy: Policy) -> None:
    ctypes.string_at(0)


def cuda_abort(policy: Policy) -> None:
    """As libtorch ends a process whose GPU has met an error in another thread."""
    words = (
        "terminate called after throwing an instance of 'c10::AcceleratorError'\n"
        "  what():  CUDA error: an illegal memory access was encountered\n"
    )
    os.write(2, words.encode())
    os.abort()


def killed(policy: Policy) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def silent(policy: Policy) -> None:
    os._exit(0)


def half(policy: Policy) -> None:
    Path(sys.argv[2]).write_text('{"outcome": "ok", "metr')
    os._exit(0)


def liar(policy: Policy) -> None:
    """Everything is measured and written, then the process dies."""
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)


def forged(policy: Policy) -> None:
    """A result that says ok, of a process that failed."""
    Path(sys.argv[2]).write_text(json.dumps(Result(Outcome.ERROR, ["x"]).to_dict() | {"outcome": "ok"}))
    os._exit(1)


def loud(policy: Policy) -> None:
    block = b"x" * 999 + b"\n"
    for _ in range(GIGABYTE // len(block) // 1000):
        os.write(1, block * 1000)
    raise RuntimeError("hoarse")


def device_oom(policy: Policy) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")


def host_oom(policy: Policy) -> None:
    """A real one: the process may have 100 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 10**8
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.zeros(10**9)


def orphan(policy: Policy) -> None:
    """Leaves a process behind, in a session of its own, which holds the output open."""
    words = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[2]]
    subprocess.Popen(words, start_new_session=True)


def hang(policy: Policy) -> None:
    """Does not hear SIGTERM, nor does what it started in another session."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphan(policy)
    time.sleep(600)


FAULTS: dict[str, Callable[[Policy], None]] = {
    "none": no_fault,
    **{
        fault.__name__: fault
        for fault in (
            *(
                exception,
                late_exception,
                not_finite,
                late_not_finite,
                wrong,
                segv,
                cuda_abort,
                killed,
                silent,
                half,
                liar,
                forged,
            ),
            *(loud, device_oom, host_oom, orphan, hang),
        )
    },
}
