"""Hydra's callback that gathers how the points of a run or a sweep ended."""

from collections import Counter
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

FINISHED: list[dict[str, Any]] = []
"""Of a sweep whose points run in this process, those that have returned."""


class Outcomes(Callback):
    """Kept out of `pi0exp.__main__`, which exists twice when it is run with `python -m`."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Of a single point; it runs where the point runs. Those of a sweep come through pi0exp.sweeper, at its end."""
        if isinstance(point := job_return._return_value, dict):
            if config.hydra.mode == RunMode.MULTIRUN:
                FINISHED.append(point)
            else:
                POINTS.append(point | {"sweep": False})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from pi0exp import card, explain

        measured = any("run_id" in point for point in POINTS)
        explained = any(EXPLAINED in point for point in POINTS)
        table = explain.table if explained and not measured else card.table
        if any("trial" in point for point in POINTS):
            from pi0exp.search import shown

            table = shown.table
        card.show(table(POINTS))
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

    explained: nothing was measured now, and what counts is whether a point was before, and with which settings.
    """
    if explained:
        return _closing_explained(study, points)
    missing = [f"#{i} {point['outcome']}" for i, point in enumerate(points) if not settled(point)]
    head = f"study {study}: {len(points) - len(missing)} of {len(points)} points settled"
    if not missing:
        return f"{head}, complete"
    return f"{head}; missing: {', '.join(missing)}; the same command again measures only these"


def _closing_explained(study: str, points: list[dict[str, Any]]) -> str:
    """A line for each `measure=` with which some points are settled, the most complete first."""
    measured = [set(point[EXPLAINED]["settled"]) if EXPLAINED in point else set() for point in points]
    ways = Counter(how for one in measured for how in one)
    if not ways:
        return f"study {study}: 0 of {len(points)} points settled"
    lines = []
    for how, count in ways.most_common():
        lacking = ", ".join(f"#{i}" for i, one in enumerate(measured) if how not in one)
        rest = f"; a run with it measures only {lacking}" if lacking else ", complete"
        lines.append(f"study {study}: {count} of {len(points)} points settled with {how}{rest}")
    return "\n".join(lines)


def kept() -> str:
    """What an interrupted sweep leaves, to go on with its last line."""
    count = sum(settled(point) for point in FINISHED if EXPLAINED not in point)
    if not count:
        return ""
    return f"; {count} finished before: the same command again measures only the others"


def settled(point: dict[str, Any]) -> bool:
    """Whether a point need not be measured again."""
    if "trial" in point:  # of a search, which learned from it that this is no candidate
        return bool(point["outcome"] != Outcome.INTERRUPTED)
    return point["outcome"] in {outcome.value for outcome in Outcome if outcome.settled}


def exit_code() -> int:
    """0 if every point is ok, or unsupported as one of a sweep; otherwise the largest code."""
    unsupported = Outcome.UNSUPPORTED.exit_code
    codes = [0 if point["sweep"] and point["exit_code"] == unsupported else point["exit_code"] for point in POINTS]
    return max(codes, default=0)
