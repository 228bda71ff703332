"""The search itself: propose, measure, tell, until as many points are measured as were asked for.

Each stack is measured once, however often it is proposed. What the options themselves say about a stack that cannot run
is told to the sampler without starting a child; such proposals are not counted as points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pi0exp.point import tell
from pi0exp.search.proposals import Proposals
from pi0exp.search.settings import SearchConfig
from pi0exp.search.space import Row, Space
from pi0exp.search.trial import Trial, called, counted

Measure = Callable[[Sequence[str]], dict[str, Any]]
"""Words of a stack -> what its run returned; see pi0exp.point."""

FREE = 300
"""Proposals in a row that start no child, after which the search ends: there is next to nothing left to propose."""


@dataclass(frozen=True)
class Named:
    """A named stack that takes part. row: None where it sets what is no factor, so that the sampler cannot learn of it.

    words: those of the row, or its name.
    """

    name: str
    words: tuple[str, ...]
    row: Row | None


@dataclass
class Found:
    """trials: in the order in which they were measured. excluded: proposals that were never measured, by their reason.

    ended: why the search stopped before it had as many points as were asked for; "" if it had.
    """

    trials: list[Trial] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    ended: str = ""


def search(space: Space, named: Sequence[Named], settings: SearchConfig, measure: Measure) -> Found:
    """All trials, the named stacks first."""
    proposals = Proposals(space, len(settings.objectives), settings.seed)
    found, known = Found(), set[tuple[str, ...]]()

    def measured(words: tuple[str, ...], name: str = "") -> Trial:
        feasible = (trial for trial in found.trials if not trial.infeasible(settings.objectives))
        best = min((trial.values(settings.objectives)[0] for trial in feasible), default=None)
        so_far = "" if best is None else f", best so far {best:.2f} ms"
        tell(f"search: point {len(found.trials) + 1} of {settings.n_trials}{so_far}: {called(words, name)}")
        trial = Trial(words, measure(words), name)
        found.trials.append(trial)
        known.add(words)
        return trial

    names = {one.words: one.name for one in named}
    for one in named:
        if one.row is None:
            measured(one.words, one.name)
        else:
            proposals.enqueue(one.row)
    free = 0
    while len(found.trials) < settings.n_trials and free < FREE:
        handle, row = proposals.ask()
        words, reasons = tuple(space.words(row)), space.excluded(row)
        if reasons:
            proposals.tell_infeasible(handle, float(len(reasons)) + 1)
            found.excluded.append(reasons[0])
            free += 1
        elif words in known:
            proposals.tell_again(handle)
            free += 1
        else:
            free, trial = 0, measured(words, names.get(words, ""))
            if trial.infeasible(settings.objectives):
                proposals.tell_infeasible(handle, 1.0)
            else:
                proposals.tell(handle, trial.values(settings.objectives))
    if len(found.trials) < settings.n_trials:
        found.ended = f"{FREE} proposals in a row were known or excluded"
    tell(f"search: {len(found.trials)} points, {counted(found.trials, settings.objectives)}")
    return found
