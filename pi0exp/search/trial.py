"""A trial: a stack, and what its measurement came to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pi0exp.option import Numerics
from pi0exp.result import Outcome
from pi0exp.search.settings import Objective

P50, ERROR = "latency_ms/p50", "error/rel_l2"


def called(words: Sequence[str], name: str) -> str:
    """A stack in progress lines and lists: its name, or the words of one that has none."""
    return name or " ".join(words)


@dataclass(frozen=True)
class Trial:
    """words: of the stack, without those that hold for all. point: what the run returned. name: of a named stack."""

    words: tuple[str, ...]
    point: dict[str, Any]
    name: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.point["metrics"])

    @property
    def key(self) -> str:
        return str(self.point["key"])

    def infeasible(self, objectives: Sequence[Objective]) -> str:
        """In a word why it can never be the best; "" if it can."""
        if self.point["outcome"] != Outcome.OK:
            return str(self.point["outcome"])
        if self.point["numerics"] == Numerics.APPROXIMATE.name:
            return Numerics.APPROXIMATE.name
        missing = [objective.metric for objective in objectives if objective.metric not in self.point["metrics"]]
        return f"ok without {missing[0]}" if missing else ""

    def values(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """Of a feasible one: one number an objective."""
        return tuple(self.point["metrics"][objective.metric] for objective in objectives)


def counted(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """How the trials ended: "38 ok, 2 wrong_numerics"."""
    found = Counter(trial.infeasible(objectives) or Outcome.OK.value for trial in trials)
    return ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere worse than b, and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))
