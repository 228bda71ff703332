"""A subject that is no policy, fast and without torch; `subject.fault` says what goes wrong with it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi0exp.errors import UnsupportedError, UserError
from pi0exp.option import Numerics
from pi0exp.subject import Verdict


@dataclass
class ToyInstance:
    verdict: Verdict
    applied: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=lambda: {"toy": "yes"})
    startup_s: dict[str, float] = field(default_factory=lambda: {"build": 0.5})
    samples_per_call: int = 2
    late: bool = False

    def call(self, index: int) -> None:
        if self.late:
            raise UnsupportedError("the toy takes no\n  second call")
        time.sleep(0.001)

    def call_host(self, index: int) -> None:
        time.sleep(0.001)

    def watched(self, watch: Any) -> None:
        """It has no stages."""

    def launched(self, watch: Any) -> None:
        """It has no graphs."""

    def recheck(self) -> list[str]:
        return []

    def attachments(self) -> dict[str, str]:
        return {}

    def counters(self) -> dict[str, float]:
        return {"toy/calls": 1.0}


@dataclass
class Toy:
    fault: str

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Toy":
        return cls(plain["subject"].get("fault", "none"))

    @property
    def numerics(self) -> Numerics:
        return Numerics.REORDERED

    def params(self) -> dict[str, str]:
        return {"subject.fault": self.fault}

    def preflight(self) -> None:
        if self.fault == "input":
            raise UserError("subject.fault is input;\n  choose another")
        if self.fault == "kill_job":  # the process that runs the point, not the one that measures
            os.kill(os.getpid(), signal.SIGKILL)

    def unmet(self, machine: Any) -> list[str]:
        return ["it is not supported anywhere"] if self.fault == "unmet" else []

    def environment(self) -> dict[str, str]:
        return {}

    def proofs(self) -> list[tuple[str, str]]:
        return []

    def work(self) -> list[Any]:
        return []

    def stack_work(self) -> list[Any]:
        return []

    def files(self) -> dict[str, Any]:
        return {}

    def matrix_rate(self) -> str:
        raise NotImplementedError

    def build(self, device: Any, inputs: int, progress: Any) -> ToyInstance:
        progress(f"fault {self.fault}")
        print(f"about to {self.fault}", flush=True)
        wrong = getattr(self, f"_{self.fault}")() or []
        return ToyInstance(Verdict(wrong, {"error/rel_l2": 0.25 if wrong else 0.01}), late=self.fault == "late")

    def _none(self) -> None:
        pass

    def _late(self) -> None:
        """Can be built, but not called."""

    def _lacking(self) -> None:
        raise UnsupportedError("the toy has no wheels")

    def _wrong(self) -> list[str]:
        return ["the toy is not what it was"]

    def _crash(self) -> None:
        raise RuntimeError("the toy broke\nin two")

    def _abort(self) -> None:
        os.abort()

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _hang(self) -> None:
        time.sleep(600)

    def _wait(self) -> None:
        """Until the test has done to the store what it wants to."""
        while not Path(self._target()).with_name("go").exists():
            time.sleep(0.02)

    def _stubborn(self) -> None:
        """Hangs, does not hear SIGTERM, and so does what it started."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", self._target()])
        time.sleep(600)

    def _orphan(self) -> None:
        """Leaves a process behind that holds its output open."""
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", self._target()])

    def _loud(self) -> None:
        for _ in range(50):
            sys.stdout.write("x" * 1_000_000)
        sys.stdout.flush()
        raise RuntimeError("hoarse")

    def _half(self) -> None:
        Path(self._target()).write_text('{"outcome": "ok", "metr')
        os._exit(0)

    def _traced(self) -> None:
        """Leaves a file beside its result."""
        folder = Path(self._target()).with_suffix(".files")
        folder.mkdir()
        (folder / "trace.json.gz").write_bytes(b"\x1f\x8b trace")

    def _untold(self) -> None:
        """Leaves such a file, but no result."""
        self._traced()
        os._exit(0)

    def _foreign(self) -> None:
        Path(self._target()).write_text('{"outcome": "ok", "metrics": {}}')
        os._exit(0)

    def _silent(self) -> None:
        os._exit(0)

    def _two(self) -> None:
        os._exit(2)

    def _oom(self) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")

    def _host_oom(self) -> None:
        raise MemoryError

    def _refuse(self) -> None:
        raise UserError("subject.fault is refuse;\n  choose another")

    def _target(self) -> str:
        return sys.argv[2]
