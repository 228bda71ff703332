"""Hydra's sweeper, and with it the results of points that ran elsewhere: on a Ray cluster, on Slurm, in processes.

Hydra's callbacks run where the point runs. What comes home to the command is what the launcher returns, to the sweeper.
"""

import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from pi0exp import outcomes, sweep

NAME = "hydra_plugins.pi0exp.Sweep"
"""Its name in `conf/`. Hydra takes plugins only from this namespace and its own, and looks the class up by the name."""


class Sweep(Sweeper):
    """All points of a sweep at once. params, points: see pi0exp.sweep."""

    def __init__(self, params: dict[str, str] | None = None, points: list[str] | None = None) -> None:
        self.params, self.points = params or {}, points or []
        self.study = ""
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.study = config.hydra.runtime.choices.get("study") or ""
        inner = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.launcher = _Gathering(inner, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run all points; arguments: of the command line. Raises UserError before the first for what cannot be."""
        if self.study:
            sweep.check_arguments(self.study, self.params, self.points, arguments)
        batch = sweep.expanded(self.params, self.points, arguments)
        self.validate_batch_is_legal(batch)
        assert self.launcher is not None
        self.launcher.launch(batch, initial_job_idx=0)


class _Gathering(Launcher):
    """A launcher whose returns go to pi0exp.outcomes."""

    def __init__(self, inner: Launcher, cfg: DictConfig) -> None:
        self._inner, self._cfg = inner, cfg

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """`inner` was set up before."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """An empty list: a point that died is an outcome among the others, and no error of the sweep."""
        if type(self._inner).__name__ == "BasicLauncher":
            outcomes.gather(self._inner.launch(job_overrides, initial_job_idx))
            return []
        # Not above: `--help` is to answer at once.
        from pi0exp import config, launchers, load

        cfg = self._cfg
        store, run = None, config.run({"name": cfg.name, "track": OmegaConf.to_container(cfg.track, resolve=True)})
        if not cfg.measure.explain:
            # Before the points start: several processes cannot create one SQLite file at once.
            store = launchers.store_for(self._inner, run.track)
        choice = cfg.hydra.runtime.choices["hydra/launcher"]
        print(f"pi0exp: {len(job_overrides)} points go to hydra/launcher={choice}", file=sys.stderr, flush=True)
        returns = launchers.launch(self._inner, job_overrides, initial_job_idx)
        outcomes.gather(returns)
        if store is not None and any(one.status is JobStatus.FAILED for one in returns):
            load.recover(store, run.name)  # the point of a process that was killed, as far as it ran on this host
        return []


def register(plugins: Any) -> None:
    """plugins: Hydra's."""
    from pi0exp.search import sweeper as search  # not above: it imports this file

    plugins.class_name_to_class[NAME] = Sweep
    plugins.class_name_to_class[search.NAME] = search.Search
