"""What a search is told (`search:` of `experiments/study/search.yaml`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pi0exp import config, sweep
from pi0exp.errors import UserError

CONF = "conf"
"""The value of `search.write` that stands for the folder of the named stacks."""


class Objective(StrEnum):
    """What is to become small: the p50 in milliseconds, or the energy of a call in joules."""

    latency = "latency"
    energy = "energy"

    @property
    def metric(self) -> str:
        return {"latency": "latency_ms/p50", "energy": "energy_j/call"}[self]


@dataclass(frozen=True)
class SearchConfig:
    """n_trials: points, those of `stacks` among them. seed: of the sampler; the same one proposes the same points.

    objectives: one, or both for a Pareto front. stacks: named stacks that are measured first. candidates: how many of
    the best take part in the closing comparison, beside the best named stack; repeats: how often it measures each.
    write: where the result goes: `conf`, a folder, a file NAME.yaml, or None for nowhere; see pi0exp.search.stack_file.
    """

    n_trials: int = 60
    seed: int = 0
    objectives: tuple[Objective, ...] = (Objective.latency,)
    stacks: tuple[str, ...] = ()
    candidates: int = 3
    repeats: int = 1
    write: str | None = CONF

    def __post_init__(self) -> None:
        for name in ("objectives", "stacks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # OmegaConf makes lists of tuples
        for name, least in (("n_trials", 1), ("seed", 0), ("candidates", 1), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        if Objective.latency not in self.objectives or len(set(self.objectives)) != len(self.objectives):
            given = ",".join(self.objectives)
            raise ValueError(f"objectives is {given or 'empty'}; choose latency or latency,energy")
        if repeated := [name for name in self.stacks if self.stacks.count(name) > 1]:
            raise ValueError(f"stacks names {repeated[0]} twice")


LISTS = ("objectives", "stacks")
"""Settings that hold several values: `search.objectives=latency,energy` is such a list and no sweep over two."""


def settings(node: Any, words: Sequence[str] = ()) -> SearchConfig:
    """The settings of a composed section.

    words: those of the command line that begin with `search.`; Hydra takes commas for a sweep, and does not compose
    it. Raises UserError.
    """
    values = dict(node) if isinstance(node, dict) else {}
    for word in words:
        key = sweep.key_of(word).removeprefix("search.")
        swept = [point[f"search.{key}"].partition("=")[2] for point in sweep.combinations([word])]
        if len(swept) > 1 and key not in LISTS:
            raise UserError(f"{word}: one search has one value of it; start a command for each")
        if len(swept) > 1:
            values[key] = swept
    for key in LISTS:
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    return config.typed(SearchConfig, values, "search")
