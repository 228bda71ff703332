"""Hydra's callback that gathers how the points of a run or a sweep ended."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from pi0exp.result import Outcome

EXPLAINED = "explained"
"""The outcome in the closing table of a sweep of points that are not measured; it is none of a measurement's."""
POINTS: list[dict[str, Any]] = []
"""What the points returned: exit_code and what the closing table shows; and sweep, whether it was one of several."""


class Outcomes(Callback):
    """Kept out of `pi0exp.__main__`, which exists twice when it is run with `python -m`."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Of a single point; it runs where the point runs. Those of a sweep come through pi0exp.sweeper."""
        if config.hydra.mode != RunMode.MULTIRUN and isinstance(point := job_return._return_value, dict):
            POINTS.append(point | {"sweep": False})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from pi0exp import card, explain

        measured = any("run_id" in point for point in POINTS)
        explained = any(EXPLAINED in point for point in POINTS)
        table = explain.table if explained and not measured else card.table
        if any("trial" in point for point in POINTS):
            from pi0exp.search import shown

            table = shown.table
        card.console().print(table(POINTS))
        if POINTS:
            print(closing(str(config.name), POINTS, explained and not measured))


def gather(returns: Sequence[JobReturn]) -> None:
    """Points of a sweep, as their launcher brought them home."""
    for one in returns:
        point = one._return_value if isinstance(one._return_value, dict) else died(one)
        POINTS.append(point | {"sweep": True})


def died(job: JobReturn) -> dict[str, Any]:
    """The point of a job that returned nothing: its process was killed, its host went away, it was cancelled."""
    error = job._return_value
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"its job died: {type(error).__name__}: {lines[0] if lines else 'no message'}"
    given = dict(override.lstrip("+~").split("=", 1) for override in job.overrides or [] if "=" in override)
    outcome = Outcome.ERROR
    kept = {"outcome": outcome.value, "reasons": [reason], "exit_code": outcome.exit_code}
    return kept | {"metrics": {}, "params": given}


def closing(study: str, points: list[dict[str, Any]], explained: bool) -> str:
    """Whether a sweep is complete, or which points are missing, by their number in the table.

    explained: nothing was measured now, and what counts is whether a point was before.
    """
    missing = [
        f"#{i} {'not measured' if explained and point['outcome'] == EXPLAINED else point['outcome']}"
        for i, point in enumerate(points)
        if not settled(point)
    ]
    head = f"study {study}: {len(points) - len(missing)} of {len(points)} points settled"
    if not missing:
        return f"{head}, complete"
    command = "a run without measure=explain" if explained else "the same command again"
    return f"{head}; missing: {', '.join(missing)}; {command} measures only these"


def settled(point: dict[str, Any]) -> bool:
    """Whether a point need not be measured again; of one that is explained, whether it was measured before."""
    if EXPLAINED in point:
        return bool(point[EXPLAINED]["settled"])
    if "trial" in point:  # of a search, which learned from it that this is no candidate
        return bool(point["outcome"] != Outcome.INTERRUPTED)
    return point["outcome"] in {outcome.value for outcome in Outcome if outcome.settled}


def exit_code() -> int:
    """0 if every point is ok, or unsupported as one of a sweep; otherwise the largest code."""
    unsupported = Outcome.UNSUPPORTED.exit_code
    codes = [0 if point["sweep"] and point["exit_code"] == unsupported else point["exit_code"] for point in POINTS]
    return max(codes, default=0)
