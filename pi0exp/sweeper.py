"""Hydra's sweeper, and with it the results of points that ran elsewhere: on a Ray cluster, on Slurm, in processes.

Hydra's callbacks run where the point runs. What comes home to the command is what the launcher returns, to the sweeper.
"""

import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from pi0exp import compose, config, launchers, outcomes

NAME = "hydra_plugins.pi0exp.Sweeper"
"""Its name in `conf/`. Hydra takes plugins only from this namespace and its own, and looks the class up by the name."""


class Sweeper(BasicSweeper):
    """BasicSweeper, except that it gathers the returns, and that a point which died does not end the sweep."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        assert self.launcher is not None
        compose.check_study(config.hydra)
        self.launcher = _Gathering(self.launcher, config)


class _Gathering(Launcher):
    """A launcher whose returns go to pi0exp.outcomes."""

    def __init__(self, inner: Launcher, cfg: DictConfig) -> None:
        self._inner, self._cfg = inner, cfg

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """`inner` was set up before."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """An empty list: the sweeper would raise the error of a point that died, and the others would be lost."""
        if type(self._inner).__name__ == "BasicLauncher":
            outcomes.gather(self._inner.launch(job_overrides, initial_job_idx))
            return []
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
            store.mark_torn(run.name)  # the run of a point whose process was killed, as far as it ran on this host
        return []


def register(plugins: Any) -> None:
    """plugins: Hydra's."""
    plugins.class_name_to_class[NAME] = Sweeper
