"""Hydra's launchers for many machines, so used that a job which dies is one failed point.

The launchers of hydra-ray-launcher and hydra-submitit-launcher wait for their jobs one after another, and raise at the
first that died: the results of all others would be lost, and an interrupt would leave the jobs running. Here jobs are
started with the launchers' own settings and parts; what is ours is to wait for each by itself, and to end them.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

from pi0exp import interrupts
from pi0exp.config import TrackConfig
from pi0exp.errors import UserError
from pi0exp.machine import set_visibility, store_environment, tracking_uri, visibility
from pi0exp.track import Store

PRINT_S = 1.0
"""How long Ray may take to bring home what points printed; it looks for that ten times a second."""
END_S = 30.0
"""How long jobs may take to end their points after an interrupt; Slurm gives as much before it kills."""

Batch = Sequence[Sequence[str]]
"""The overrides of each point."""


def launch(launcher: Launcher, batch: Batch, first: int) -> Sequence[JobReturn]:
    """What each point returned, in their order; of one whose job died, why, with the status FAILED.

    first: number of the first point. Launchers that are not known here do it in their way.
    """
    ways = {"RayLauncher": _on_ray, "LocalLauncher": _by_submitit, "SlurmLauncher": _by_submitit}
    way = ways.get(type(launcher).__name__)
    return way(launcher, batch, first) if way else launcher.launch(batch, initial_job_idx=first)


def store_for(launcher: Launcher, track: TrackConfig) -> Store:
    """The store, created where there is none. Raises UserError where points on other hosts could not reach it."""
    uri, kind = track.uri or tracking_uri(), type(launcher).__name__
    if uri is None and (kind == "SlurmLauncher" or (kind == "RayLauncher" and _ray_hosts(launcher) > 1)):
        raise UserError(
            "points on several hosts cannot share a local SQLite file: set track.uri or MLFLOW_TRACKING_URI to an "
            "MLflow server (docs/many_gpus.md)"
        )
    return Store.open(uri, None if track.root is None else Path(track.root))


def _each(
    jobs: Sequence[Any], batch: Batch, result: Callable[[Any], JobReturn], end: Callable[[Any], None]
) -> list[JobReturn]:
    """Wait for all; where that is interrupted, end them."""
    try:
        return [_returned(partial(result, job), overrides) for job, overrides in zip(jobs, batch, strict=True)]
    except BaseException:
        end(jobs)
        raise


def _returned(result: Callable[[], JobReturn], overrides: Sequence[str]) -> JobReturn:
    try:
        return result()
    except Exception as error:
        made = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
        made.return_value = error
        return made


# ---- submitit: processes of this host, or Slurm


@dataclass
class _Job:
    """What runs in a job of submitit. visible: hides GPUs as they are hidden from the command; None leaves them."""

    launcher: Any
    visible: dict[str, str] | None

    def __call__(self, *given: Any) -> Any:
        interrupts.install()  # submitit ignores SIGTERM, by which Slurm cancels
        if self.visible is not None:
            set_visibility(self.visible)
        return self.launcher(*given)

    def checkpoint(self, *given: Any) -> Any:
        """For a job that is preempted and queued again: the same once more. What is settled by then is not measured."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *given)


def _by_submitit(launcher: Any, batch: Batch, first: int) -> list[JobReturn]:
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    kind, given = launcher._EXECUTOR, dict(launcher.params)
    folder, common = given.pop("submitit_folder"), set(OmegaConf.structured(BaseQueueConf).keys())
    own = {f"{kind}_max_num_timeout": given.pop(name) for name in ("max_num_timeout",) if name in given}
    executor = submitit.AutoExecutor(folder=folder, cluster=kind, **own)
    executor.update_parameters(**{name if name in common else f"{kind}_{name}": value for name, value in given.items()})
    # The local executor hides all GPUs unless it is told a number; each point takes a free one itself.
    visible = visibility() if kind == "local" and given.get("gpus_per_node") is None else None
    numbers = range(first, first + len(batch))
    jobs = executor.map_array(
        _Job(launcher, visible),
        [list(overrides) for overrides in batch],
        repeat("hydra.sweep.dir", len(batch)),
        numbers,
        [f"job_id_for_{number}" for number in numbers],
        repeat(Singleton.get_state(), len(batch)),
    )
    return _each(jobs, batch, lambda job: job.results()[0], _end_submitit)


def _end_submitit(jobs: Sequence[Any]) -> None:
    """Ask all to end their points, and wait until they have."""
    left = [job for job in jobs if not job.done()]
    for job in left:
        if type(job).__name__ == "LocalJob":  # its cancel() kills after a second
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        else:
            job.cancel()
    deadline = time.monotonic() + END_S
    while (left := [job for job in left if not job.done(force_check=True)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for job in left:
        job.cancel()


# ---- Ray


def _start_ray(launcher: Any) -> Any:
    import ray
    from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

    setup_globals()
    try:
        start_ray(launcher.ray_cfg.init)
    except Exception as error:  # of many kinds: no cluster there, a setting that is none, a path too long for a socket
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hydra/launcher=ray: Ray does not start: {words}") from error
    interrupts.install()  # Ray has set a handler of its own for SIGTERM
    return ray


def _ray_hosts(launcher: Any) -> int:
    return sum(bool(node["Alive"]) for node in _start_ray(launcher).nodes())


def _on_ray(launcher: Any, batch: Batch, first: int) -> list[JobReturn]:
    from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray

    ray = _start_ray(launcher)
    # Ray hides all GPUs from a task that asks for none.
    gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
    remote = OmegaConf.create({**gpus, **launcher.ray_cfg.remote})
    jobs = []
    for number, overrides in enumerate(batch, first):
        cfg = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = f"job_id_for_{number}", number
            cfg.hydra.job.env_set.update(store_environment())  # workers of other hosts have another environment
        state = Singleton.get_state()
        jobs.append(launch_job_on_ray(launcher.hydra_context, remote, cfg, launcher.task_function, state))
    returns = _each(jobs, batch, ray.get, partial(_end_ray, ray))
    # What the points print comes from Ray's files a moment later. The table is to be the last: what is not here by then
    # stays in those files.
    time.sleep(PRINT_S)
    ray.shutdown()
    return returns


def _end_ray(ray: Any, jobs: Sequence[Any]) -> None:
    for job in jobs:
        ray.cancel(job)
    ray.wait(list(jobs), num_returns=len(jobs), timeout=END_S)
