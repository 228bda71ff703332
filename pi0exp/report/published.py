"""Published figures beside ours: `experiments/published.yaml`, typed, and what became of each.

A figure names the study, the parameters and the metric that measure the same thing here. On a GPU of the same kind ours
reproduces it or differs; ours on another kind stands beside it, and nothing is claimed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pi0exp import compose, config
from pi0exp.errors import UserError
from pi0exp.report.cells import number
from pi0exp.report.rows import Row, holds, named_model
from pi0exp.result import Outcome
from pi0exp.track import Record

FILE = compose.PACKAGE / "experiments" / "published.yaml"
AMD, NVIDIA = ("MI300X", "MI350", "MI350X"), ("H100", "H200")
UNITS = {"ms": 1.0, "us": 1.0, "x": 1.0, "%": 100.0, "samples/s": 1.0, "W": 1.0, "L2": 1.0}
"""Unit -> what a metric of ours is multiplied with: shares are shown in percent."""
US = 1e3
"""A figure in microseconds of a metric in milliseconds."""


class Pick(StrEnum):
    """Which of several rows that fit. only: there must be one."""

    only = "only"
    least = "least"
    most = "most"


class State(StrEnum):
    reproduced = "reproduced"
    differs = "differs"
    not_run = "not run here"
    not_measured = "not measured yet"
    unclear = "unclear"


MODEL = "pi0"
"""What was published is of this model, unless the parameters of ours name another."""


@dataclass(frozen=True)
class Ours:
    """Rows of the study with these parameters, and their metric.

    approximate: rows that compute other actions may be picked, too; where there is but one, it is asked for by name.
    """

    params: dict[str, str] = field(default_factory=dict)
    metric: str = "latency_ms/p50"
    pick: Pick = Pick.only
    approximate: bool = False


@dataclass(frozen=True)
class Figure:
    """value: as published; high: the upper end where a range is published. tolerance: share of the value within which
    ours reproduces it. gpu: kind of GPU; assumed: the source does not say it. conflicts: ids of what other sources say.

    ours: what measures the same here; null where nothing does. over: where the figure is a ratio, what is divided by
    `ours`: of times, how many times as fast `ours` is. why: the reason of a difference, if it is known.
    """

    id: str
    study: str
    what: str
    value: float
    unit: str
    gpu: str
    source: str
    high: float | None = None
    tolerance: float = 0.05
    assumed: bool = False
    conflicts: list[str] = field(default_factory=list)
    ours: Ours | None = None
    over: Ours | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; choose one of {', '.join(UNITS)}")
        if self.gpu not in (*AMD, *NVIDIA):
            raise ValueError(f"gpu is {self.gpu!r}; choose one of {', '.join((*AMD, *NVIDIA))}")
        if self.value <= 0 or (self.high is not None and self.high <= self.value):
            raise ValueError(f"value {self.value}, high {self.high}; value must be above 0, and high above it")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be a share between 0 and 1")
        if self.over is not None and self.ours is None:
            raise ValueError("over is set without ours; a ratio has two sides")

    @property
    def text(self) -> str:
        """`24.8 to 25 ms`."""
        upto = "" if self.high is None else f" to {number(self.high)}"
        return f"{number(self.value)}{upto} {self.unit}"


@dataclass(frozen=True)
class File:
    figures: list[Figure]


@dataclass(frozen=True)
class Judged:
    """ours: our value in the figure's unit; None where there is none. row: where it comes from. told: the verdict.

    others: what else was published of the same thing.
    """

    figure: Figure
    state: State
    told: str
    ours: float | None = None
    row: Row | None = None
    others: tuple[str, ...] = ()

    @property
    def ours_text(self) -> str:
        return "-" if self.ours is None else f"{number(float(f'{self.ours:.4g}'))} {self.figure.unit}"

    @property
    def gpu(self) -> str:
        return "-" if self.row is None else str(self.row.record["fingerprint"].get("gpu", "-"))


def figures(file: Path = FILE) -> list[Figure]:
    """All of the file, in its order. Raises UserError, one line, for whatever is wrong in it."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    try:
        body: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # of the YAML parser, whose errors have no common base but this
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    listed = body.get("figures") if isinstance(body, dict) else None
    if not isinstance(listed, list) or set(body) != {"figures"}:
        raise UserError(f"{file}: must hold a list `figures`, and nothing else")
    found = []
    for i, one in enumerate(listed):
        name = one.get("id", f"number {i + 1}") if isinstance(one, dict) else f"number {i + 1}"
        if not isinstance(one, dict):
            raise UserError(f"{file}: {name}: is {one!r}; it must hold settings")
        try:
            found.append(config.typed(Figure, one, str(name)))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    ids = [one.id for one in found]
    if twice := [one for one in ids if ids.count(one) > 1]:
        raise UserError(f"{file}: {twice[0]}: the id stands there twice")
    for one in found:
        if lost := [other for other in one.conflicts if other not in ids]:
            raise UserError(f"{file}: {one.id}: conflicts names {lost[0]}, which is no id")
    return found


def judged(figure: Figure, machines: Mapping[str, Sequence[Row]]) -> Judged:
    """What became of a figure. machines: GPU -> the rows of its study there.

    Ours is of the figure's kind of GPU where there is one, otherwise of the first that has it; never of a CPU.
    """
    machines = {gpu: rows for gpu, rows in machines.items() if gpu.lower() != "cpu"}
    same = [gpu for gpu in machines if figure.gpu in gpu]
    unclear = ""
    for gpu in [*same, *(gpu for gpu in machines if gpu not in same)]:
        try:
            value, row = _value(figure, machines[gpu])
        except _SeveralError as error:
            unclear = unclear or str(error)
            continue
        if value is None:
            continue
        if gpu not in same:
            state = State.not_run if figure.gpu in AMD else State.not_measured
            return Judged(figure, state, f"{state} ({_maker(figure)})", value, row)
        low, high = figure.value, figure.high or figure.value
        if low * (1 - figure.tolerance) <= value <= high * (1 + figure.tolerance):
            told = f"reproduced (within {100 * figure.tolerance:.0f} %)"
            return Judged(figure, State.reproduced, told, value, row)
        near = low if value < low else high
        told = f"differs by {100 * (value / near - 1):+.0f} %" + (f": {figure.why}" if figure.why else "")
        return Judged(figure, State.differs, told, value, row)
    if unclear:
        return Judged(figure, State.unclear, f"unclear: {unclear}")
    why = f": {figure.why}" if figure.ours is None and figure.why else ""
    if figure.gpu in AMD or figure.ours is None:
        return Judged(figure, State.not_run, f"{State.not_run} ({_maker(figure)}){why}")
    return Judged(figure, State.not_measured, str(State.not_measured))


def _maker(figure: Figure) -> str:
    return "AMD" if figure.gpu in AMD else f"on an {figure.gpu}"


class _SeveralError(Exception):
    """More rows fit than one."""


def _value(figure: Figure, rows: Sequence[Row]) -> tuple[float | None, Row | None]:
    """Ours in the figure's unit, and its row."""
    if figure.ours is None:
        return None, None
    row = _row(figure.ours, rows)
    value = None if row is None else row.metric(figure.ours.metric)
    if row is None or value is None:
        return None, None
    if figure.over is not None:
        other = _row(figure.over, rows)
        above = None if other is None else other.metric(figure.over.metric)
        return (None, None) if above is None or value == 0 else (above / value, row)
    if figure.unit == "us" and "_ms" in figure.ours.metric:
        return US * value, row
    return UNITS[figure.unit] * value, row


def _row(asked: Ours, rows: Sequence[Row]) -> Row | None:
    """Raises _SeveralError where one was asked for and several fit."""
    fitting = [
        row
        for row in rows
        if row.record["outcome"] == Outcome.OK
        and row.metric(asked.metric) is not None
        and all(_has(row.record, name, value) for name, value in ({"model": MODEL} | asked.params).items())
        and named_model(row.record, asked.params.items())
    ]
    if asked.pick is not Pick.only:
        ranked = [row for row in fitting if row.ranked or asked.approximate]
        choose = min if asked.pick is Pick.least else max
        return choose(ranked, key=lambda row: row.metric(asked.metric) or 0.0, default=None)
    if len(fitting) > 1:
        raise _SeveralError(f"{len(fitting)} rows have {', '.join(f'{k}={v}' for k, v in asked.params.items())}")
    return fitting[0] if fitting else None


def _has(record: Record, name: str, value: str) -> bool:
    """Dimensions of a model are no parameters of a run."""
    return holds(record, name, value) if name.startswith("model.") else record["params"].get(name) == value
