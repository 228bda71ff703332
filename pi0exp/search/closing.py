"""The closing comparison: the best of many noisy measurements looks better than it is, so the best are measured again.

What was chosen for being fast was lucky too (the winner's curse). The candidates and the best named stack are therefore
measured once more, on other observations (`workload.seed`), in turns, and only those measurements decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TypeVar

from pi0exp.point import tell
from pi0exp.search.loop import Measure, Named
from pi0exp.search.settings import Objective, SearchConfig
from pi0exp.search.trial import Trial, called, dominates


@dataclass(frozen=True)
class Contestant:
    """first: its trial in the search; None for a stack that was no trial. again: the closing measurements."""

    words: tuple[str, ...]
    name: str
    first: Trial | None
    again: tuple[Trial, ...] = ()

    def infeasible(self, objectives: Sequence[Objective]) -> str:
        """As that of the first of its closing measurements that is not feasible."""
        return next((reason for trial in self.again if (reason := trial.infeasible(objectives))), "")

    def values(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """The geometric mean over the closing measurements, one number an objective."""
        each = zip(*(trial.values(objectives) for trial in self.again), strict=True)
        return tuple(geometric_mean(values) for values in each)


T = TypeVar("T", Trial, Contestant)


def candidates(trials: Sequence[Trial], settings: SearchConfig) -> list[Contestant]:
    """The best of the search and the best named stack, each once; none where no trial is feasible."""
    objectives = settings.objectives
    feasible = sorted(
        (trial for trial in trials if not trial.infeasible(objectives)), key=lambda trial: trial.values(objectives)
    )
    several = len(objectives) > 1
    chosen = spread(front(feasible, objectives), settings.candidates) if several else feasible[: settings.candidates]
    best_named = next((trial for trial in feasible if trial.name), None)
    if best_named is not None and best_named not in chosen:
        chosen = [*chosen, best_named]
    return [Contestant(trial.words, trial.name, trial) for trial in chosen]


def with_standing(contestants: Sequence[Contestant], standing: Named) -> list[Contestant]:
    """And the stack that the result would replace, which need not be a point of this search."""
    if any(one.words == standing.words for one in contestants):
        return list(contestants)
    return [*contestants, Contestant(standing.words, standing.name, None)]


def front(measured: Sequence[T], objectives: Sequence[Objective]) -> list[T]:
    """Those that no other one dominates, in their order."""
    values = [one.values(objectives) for one in measured]
    return [
        one for one, own in zip(measured, values, strict=True) if not any(dominates(other, own) for other in values)
    ]


def spread(trials: list[Trial], count: int) -> list[Trial]:
    """So many of them, both ends among them."""
    if len(trials) <= count:
        return trials
    if count == 1:
        return trials[:1]
    return [trials[round(i * (len(trials) - 1) / (count - 1))] for i in range(count)]


def measured_again(
    contestants: Sequence[Contestant], settings: SearchConfig, seed: int, measure: Measure
) -> list[Contestant]:
    """Each with its closing measurements. seed: of the search's own observations, which these ones leave."""
    again: list[list[Trial]] = [[] for _ in contestants]
    for turn in range(settings.repeats):
        for one, made in zip(contestants, again, strict=True):
            tell(f"search: closing comparison, {turn + 1} of {settings.repeats}: {called(one.words, one.name)}")
            made.append(Trial(one.words, measure([*one.words, f"workload.seed={seed + 1 + turn}"]), one.name))
    return [
        Contestant(one.words, one.name, one.first, tuple(made)) for one, made in zip(contestants, again, strict=True)
    ]


def ranking(contestants: Sequence[Contestant], objectives: Sequence[Objective]) -> list[Contestant]:
    """The feasible ones by their closing measurements, the fastest first."""
    feasible = [one for one in contestants if not one.infeasible(objectives)]
    return sorted(feasible, key=lambda one: one.values(objectives))
