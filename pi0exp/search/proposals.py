"""Optuna's part: what to try next, from what is known. The only file that imports it.

The sampler is TPE, seeded: told the same results in the same order it proposes the same rows, which is how a search
goes on where it stopped. Its study lives in memory; results are kept by the store, as those of any other study.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pi0exp.errors import UserError
from pi0exp.search.space import Row, Space

CONSTRAINT = "infeasible"


class Proposals:
    """Rows to try, and what came of them."""

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        """objectives: how many numbers are to become small. Raises UserError where Optuna is not installed."""
        self._optuna = optuna()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._space = space
        sampler = self._optuna.samplers.TPESampler(seed=seed)
        self._study = self._optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)

    def enqueue(self, row: Row) -> None:
        """To be proposed before the sampler's own rows, in the order of the calls."""
        self._study.enqueue_trial({name: row[name] for name in self._space.open})

    def ask(self) -> tuple[Any, Row]:
        """A row, and the trial of Optuna's by which it is told what came of it."""
        trial = self._study.ask()
        chosen = {name: trial.suggest_categorical(name, choices) for name, choices in self._space.open.items()}
        return trial, self._space.whole(chosen)

    def tell(self, trial: Any, values: Sequence[float]) -> None:
        """A stack that may become the best. values: one an objective."""
        trial.set_constraint(CONSTRAINT, 0.0)
        self._study.tell(trial, list(values))

    def tell_infeasible(self, trial: Any, violation: float) -> None:
        """A stack that cannot run, or computes something else. violation: > 0, the more the further from allowed."""
        trial.set_constraint(CONSTRAINT, violation)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def tell_again(self, trial: Any) -> None:
        """A stack that was tried before; the sampler does not count it twice."""
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def optuna() -> Any:
    """The package. Raises UserError that says how to install it."""
    try:
        return import_module("optuna")
    except ImportError as error:
        raise UserError(
            f"study=search needs Optuna, which cannot be imported ({error}): pip install 'pi0exp[search]'"
        ) from error
