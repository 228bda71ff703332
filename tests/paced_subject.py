"""A subject without torch whose call takes `subject.ms` milliseconds; what is wrong with it is `subject.wrong`.

Where `subject.changes` is true it is wrong once it was timed."""

import time
from dataclasses import dataclass, field
from typing import Any

from pi0exp.option import Numerics
from pi0exp.subject import Verdict


@dataclass
class PacedInstance:
    ms: float
    verdict: Verdict
    applied: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    startup_s: dict[str, float] = field(default_factory=dict)
    samples_per_call: int = 1
    changes: bool = False

    def call(self, index: int) -> None:
        end = time.perf_counter() + self.ms / 1e3
        while time.perf_counter() < end:  # sleeping would wake up later than asked
            pass

    def call_host(self, index: int) -> None:
        self.call(index)

    def watched(self, watch: Any) -> None:
        """It has no stages."""

    def launched(self, watch: Any) -> None:
        """It has no graphs."""

    def recheck(self) -> list[str]:
        return ["it changed meanwhile"] if self.changes else []

    def attachments(self) -> dict[str, str]:
        return {}

    def counters(self) -> dict[str, float]:
        return {}


@dataclass
class Paced:
    ms: float
    wrong: str
    variable: str
    changes: bool = False

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Paced":
        node = plain["subject"]
        return cls(float(node["ms"]), node.get("wrong", ""), node.get("variable", ""), bool(node.get("changes")))

    @property
    def numerics(self) -> Numerics:
        return Numerics.EXACT

    def params(self) -> dict[str, str]:
        return {"subject.ms": str(self.ms)}

    def files(self) -> dict[str, Any]:
        return {}

    def preflight(self) -> None:
        pass

    def unmet(self, machine: Any) -> list[str]:
        return ["has no time at all"] if self.ms < 0 else []

    def environment(self) -> dict[str, str]:
        return {"PACED": self.variable} if self.variable else {}

    def proofs(self) -> list[tuple[str, str]]:
        return []

    def work(self) -> list[Any]:
        return []

    def matrix_dtype(self) -> Any:
        raise AssertionError("there is no GPU in this test")

    def build(self, device: Any, inputs: int, progress: Any) -> PacedInstance:
        progress("build")
        verdict = Verdict([self.wrong] if self.wrong else [], {"error/rel_l2": 0.01})
        return PacedInstance(self.ms, verdict, changes=self.changes)
