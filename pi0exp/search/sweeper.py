"""study=search as Hydra's sweeper: its points go through the launcher one by one, as those of any study do."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from pi0exp import outcomes
from pi0exp.errors import UserError
from pi0exp.sweep import key_of
from pi0exp.sweeper import Sweep

NAME = "hydra_plugins.pi0exp.Search"
"""Its name in `experiments/study/search.yaml`."""


class Search(Sweep):
    """Proposes its points itself; `params` and `points` stay empty."""

    def sweep(self, arguments: list[str]) -> None:
        """Search, compare, print and write. Raises UserError before the first point for what cannot be."""
        # Not above: Hydra is told of this class by every command, and `--help` is to answer at once.
        from pi0exp.search.narrow import narrowed
        from pi0exp.search.plan import command, plan
        from pi0exp.search.run import run
        from pi0exp.search.settings import settings

        assert self.config is not None
        words = narrowed(arguments)
        given = settings(OmegaConf.to_container(self.config.search, resolve=True), words.search)
        made = plan(words, given)

        def measure(own: Sequence[str]) -> dict[str, Any]:
            return self.measured(words.base, own)

        run(made, measure, command(arguments))

    def measured(self, base: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
        """What a point returned. own: its words, which win over those of `base`.

        Raises UserError where it was refused, which had been told: the others would be, too.
        """
        assert self.launcher is not None
        replaced = {key_of(word) for word in own}
        batch = [[*(word for word in base if key_of(word) not in replaced), *own]]
        self.validate_batch_is_legal(batch)
        before = len(outcomes.POINTS)
        self.launcher.launch(batch, initial_job_idx=before)
        [point] = outcomes.POINTS[before:]
        if point["outcome"] == "refused":
            raise UserError("the search stops, since this point was refused")
        return point
