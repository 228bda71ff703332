"""Hydra's callback that gathers how the points of a run or a sweep ended, also from launchers in other processes."""

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

POINTS: list[dict[str, Any]] = []
"""What the points returned: exit_code, and what the closing table shows of a measured point."""


class Outcomes(Callback):
    """Kept out of `pi0exp.__main__`, which exists twice when it is run with `python -m`."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if isinstance(point := job_return._return_value, dict):
            POINTS.append(point)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from pi0exp.card import console, table

        if rows := [point for point in POINTS if "outcome" in point]:
            console().print(table(rows))


def exit_code() -> int:
    """0 if every point is ok, or unsupported as one of a sweep; otherwise the largest code."""
    sweep = len(POINTS) > 1
    codes = [point["exit_code"] for point in POINTS]
    return max((0 if sweep and code == 3 else code for code in codes), default=0)
