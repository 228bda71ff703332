"""Records as rows: the latest of each point, in order, with a label, split into facets."""

import json
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pi0exp import compose
from pi0exp.config import GROUPS
from pi0exp.experiments.tables.points import changed, changes, short
from pi0exp.interval import median_interval
from pi0exp.known import comparable
from pi0exp.option import STAGES
from pi0exp.result import Outcome, measured_at
from pi0exp.track import Record

if TYPE_CHECKING:
    from pi0exp.report.study import Study

P50 = "latency_ms/p50"
OPTIONS = "options"
"""Among the labels of a study: the short form of the options, which is no parameter."""
PLAIN = "none: plain PyTorch"
"""What the short form says of a point without any option."""


@dataclass(frozen=True)
class Row:
    """names: one text for each label of the study, by which the row is told from others of its facet."""

    names: tuple[str, ...]
    record: Record

    @property
    def label(self) -> str:
        return " ".join(name for name in self.names if name != "-")

    @property
    def ok(self) -> bool:
        return bool(self.record["outcome"] == Outcome.OK)

    @property
    def approximate(self) -> bool:
        """It computes something else, within a bound or without one: it is shown, and never called best."""
        return bool(self.record["numerics"] == "APPROXIMATE")

    @property
    def ranked(self) -> bool:
        return self.ok and not self.approximate

    @property
    def quick(self) -> bool:
        return is_quick(self.record)

    @property
    def card(self) -> str:
        """The GPU among others of its kind, by its uuid; "" where nothing ran, or an older record does not say."""
        return str(self.record["fingerprint"].get("gpu_uuid", "")) if self.ok else ""

    @property
    def p50(self) -> float:
        """Milliseconds; only of a row that is ok."""
        return float(self.record["metrics"][P50])

    @property
    def calls(self) -> int:
        return len(self.record["samples"].get("latency_ms", []))

    def metric(self, name: str) -> float | None:
        found = self.record["metrics"].get(name)
        return None if found is None else float(found)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the median latency, in ms; computed from the samples for records that do not hold it."""
        low, high = self.metric("latency_ms/p50_low"), self.metric("latency_ms/p50_high")
        if low is not None and high is not None:
            return low, high
        found = median_interval(self.record["samples"].get("latency_ms", []))
        return None if found is None else (found.low, found.high)

    def interval_of(self, metric: str) -> tuple[float, float] | None:
        """Of another metric that follows from the median latency or has an uncertainty of its own; else None."""
        value = self.metric(metric)
        if value is None or metric == P50:
            return self.interval if metric == P50 else None
        if metric == "energy_j/call" and (half := self.metric("energy_j/uncertainty")) is not None:
            return value - half, value + half
        if metric in ("throughput_hz", "roofline/share") and self.interval is not None:  # both are something / p50
            return value * self.p50 / self.interval[1], value * self.p50 / self.interval[0]
        return None


@dataclass(frozen=True)
class Facet:
    """Rows that are compared with each other. title: what they have in common; "" where there is nothing to tell."""

    title: str
    rows: tuple[Row, ...]
    baseline: Row | None = None

    @property
    def ok(self) -> list[Row]:
        return [row for row in self.rows if row.ok]

    @property
    def ranked(self) -> list[Row]:
        return [row for row in self.rows if row.ranked]

    @property
    def best(self) -> Row | None:
        """The fastest of those that compute the same."""
        return min(self.ranked, key=lambda row: row.p50, default=None)

    def ratio(self, row: Row) -> float | None:
        """How many times as fast as the baseline."""
        return self.baseline.p50 / row.p50 if self.baseline is not None and row.ok else None


def cards(found: Iterable[Facet]) -> list[str]:
    """The GPUs of one kind on which the rows were measured, in the order of the rows."""
    return list(dict.fromkeys(row.card for facet in found for row in facet.rows if row.card))


def is_quick(record: Record) -> bool:
    return bool(record["params"].get("measure") == "quick")


def latest(records: Iterable[Record]) -> list[Record]:
    """Of several measurements of one experiment the last; a quick one only where there is no other.

    records: the first one first; of two of a day without a time the order counts.
    """

    def when(record: Record) -> tuple[bool, str]:
        return not is_quick(record), measured_at(record)

    found = {}
    for record in sorted(records, key=when):
        found[json.dumps(comparable(record["experiment"]), sort_keys=True)] = record
    return list(found.values())


def facets(study: "Study", records: Iterable[Record]) -> list[Facet]:
    """The records of one study on one machine."""
    config, parts = study.report, dict[tuple[str, ...], list[Record]]()
    varied = _varied(study)
    kept = sorted(latest(records), key=lambda record: _order(study, record))
    for record in kept:
        parts.setdefault(tuple(shown(record, name, varied) for name in config.facet), []).append(record)
    made = []
    for values, members in parts.items():
        title = ", ".join(_titled(name, value) for name, value in zip(config.facet, values, strict=True))
        rows = labelled(members, [name for name in config.label if name not in config.facet], varied)
        one = Facet(title, tuple(rows))
        first = next(iter(one.ranked), None) or next(iter(one.ok), None)
        baseline = {"first": first, "best": one.best, "none": None}[config.baseline]
        made.append(replace(one, baseline=baseline))
    return made


def _order(study: "Study", record: Record) -> tuple[Any, ...]:
    """As planned, if it was; otherwise the slowest first. Facets come in the order of their first rows."""
    place = _place(study, record) if study.report.order == "sweep" else 0
    named = [shown(record, name, _varied(study)) for name in study.report.facet]
    return place, named, -record["metrics"].get(P50, 0.0), record["key"]


def _varied(study: "Study") -> frozenset[str]:
    """Parameters that have a place of their own: they are no part of what a model or workload is called."""
    config = study.report
    swept = (name for words in study.planned for name in words)
    return frozenset([*config.label, *config.series, *filter(None, [config.x]), *swept])


def _place(study: "Study", record: Record) -> int:
    """Which of the planned points this is: of those that nothing speaks against the one that says the most.

    Words that the study would have without them say nothing: `workload.seed=0`, for the point that changes nothing.
    Where points name stacks, one of a stack is none of those that set its options one by one, nor the other way round.
    """
    stacks = any("stack" in words for words in study.planned)
    fits = [
        i
        for i, words in enumerate(study.planned)
        if all(holds(record, *word) for word in words.items())
        and (not stacks or record["params"].get("stack") == words.get("stack", study.stack))
    ]
    if len(fits) < 2:
        return fits[0] if fits else len(study.planned)

    def said(i: int) -> tuple[int, int]:
        words = study.planned[i]
        return sum(not study.has(*word) for word in words.items()), len(words)

    return max(fits, key=said)


def holds(record: Record, name: str, value: str) -> bool:
    """Whether `name=value` of the command line is true of a point.

    A parameter that a point does not have is as in its file: that is in the whole experiment. What stands in neither,
    a setting that did not exist yet, speaks against nothing.
    """
    params = record["params"]
    if params.get(name) == value:
        return True
    if "." in name:
        with suppress(KeyError):
            return bool(compose.at(record["experiment"], name) == compose.value_of(value))
    return name not in params


def named_model(record: Record, words: Iterable[tuple[str, str]]) -> bool:
    """Whether its model is what the name says, but for what words of the command line say: no parameter tells it."""
    if record["params"].get("model") not in compose.files()["model"]:
        return True  # nothing to hold it against
    asked = {name for name, value in words if holds(record, name, value)}
    return all(f"model.{name}" in asked for name in changed(record, "model"))


def unmeasured(
    study: "Study", records: Iterable[Record], asked: Iterable[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """The planned points that none of the records is, each by its words. asked: further words, of all points."""
    there = set()
    for record in records:
        place = _place(study, record)
        if place < len(study.planned) and named_model(record, [*asked, *study.planned[place].items()]):
            there.add(place)
    return [words for i, words in enumerate(study.planned) if i not in there]


def missing(study: "Study", records: Iterable[Record]) -> list[str]:
    """The same as texts, each by the words that tell it."""
    alone = len({name for words in study.planned for name in words}) == 1
    return [
        " ".join(value if alone else f"{name}={value}" for name, value in words.items())
        for words in unmeasured(study, records)
    ]


def shown(record: Record, name: str, varied: Container[str] = ()) -> str:
    """The value of a parameter for a reader; "-" where the point has none.

    A model or workload with what is not as in its file, less what is `varied`.
    """
    params = record["params"]
    if name == OPTIONS:
        return options(params)
    if name in ("model", "workload") and params.get(name) in compose.files()[name]:
        changed = (one for one in changes(record, name) if f"{name}.{one.partition('=')[0]}" not in varied)
        return " ".join([params[name], *changed])
    group, _, setting = name.partition(".")
    if name in params or setting in STAGES:  # a stage without an option of its own has that of all
        return str(params.get(name, params.get(group, "-")))
    node = record["experiment"].get(group)
    value = node.get(setting) if group in GROUPS and isinstance(node, dict) else None
    return "-" if value is None else str(value)


def options(params: dict[str, str]) -> str:
    return short(params).strip("`") if set(GROUPS) <= params.keys() else params.get("stack", "-")


def _titled(name: str, value: str) -> str:
    return value if name in ("model", "workload", "stack", OPTIONS) else f"{name} {value}"


def labelled(records: Sequence[Record], label: Sequence[str], varied: Container[str] = ()) -> list[Row]:
    """Rows with the texts of these parameters, or of the options; what else differs between equals is added."""
    names = list(label) or [OPTIONS]
    texts = [tuple(shown(record, name, varied) for name in names) for record in records]
    counts = Counter(texts)
    rows = []
    for record, text in zip(records, texts, strict=True):
        alike = [other for other, its in zip(records, texts, strict=True) if its == text]
        extra = _differing(record, alike, names) if counts[text] > 1 else []
        rows.append(Row((*text[:-1], " ".join([text[-1], *extra])), record))
    return rows


def _differing(record: Record, alike: list[Record], names: list[str]) -> list[str]:
    """name=value of each parameter in which it differs from rows of the same label."""
    params = dict.fromkeys(name for other in alike for name in other["params"] if name not in (*names, "measure"))
    return [
        f"{name}={record['params'].get(name, '-')}"
        for name in params
        if len({other["params"].get(name) for other in alike}) > 1
    ]
