"""Hydra's callback that gathers how the points of a run or a sweep ended."""

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from pi0exp.result import Outcome

POINTS: list[dict[str, Any]] = []
"""What the points returned: exit_code and what the closing table shows; and sweep, whether it was one of several."""


class Outcomes(Callback):
    """Kept out of `pi0exp.__main__`, which exists twice when it is run with `python -m`."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if isinstance(point := job_return._return_value, dict):
            POINTS.append(point | {"sweep": config.hydra.mode == RunMode.MULTIRUN})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from pi0exp import card, explain

        measured = any("run_id" in point for point in POINTS)
        explained = any(explain.EXPLAINED in point for point in POINTS)
        table = explain.table if explained and not measured else card.table
        card.console().print(table(POINTS))


def exit_code() -> int:
    """0 if every point is ok, or unsupported as one of a sweep; otherwise the largest code."""
    unsupported = Outcome.UNSUPPORTED.exit_code
    codes = [0 if point["sweep"] and point["exit_code"] == unsupported else point["exit_code"] for point in POINTS]
    return max(codes, default=0)
