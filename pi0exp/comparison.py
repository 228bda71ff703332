"""Two measured points side by side: what differs in the configuration, every metric, and what may be claimed."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pi0exp import intervals
from pi0exp.config import GROUPS
from pi0exp.interleave import BASELINE, Pair
from pi0exp.intervals import Interval, Statistic
from pi0exp.operands import Asked, Point
from pi0exp.result import Outcome, Result
from pi0exp.track import Record

HEADLINE = "latency_ms/p50"
NO_CLAIM = "no claim"
TIMES = ("latency", "stage_ms/", "kernels_ms/", "startup_s/", "graphs/replay_us")
"""Prefixes of metrics of which less is faster."""
_RATE = "throughput_hz"
_PRINTS = ("gpu", "arch", "driver", "cuda", "hip", "cpu", "cores", "commit", "dirty", "date")
_STATISTICS: Mapping[str, Statistic] = {
    **{f"p{percent}": partial(np.percentile, q=percent, axis=-1) for percent in (10, 50, 90, 99)},
    "mean": partial(np.mean, axis=-1),
}


@dataclass(frozen=True)
class Row:
    """A metric of both sides; None where a side has it not. verdict: of B, "" where there is nothing to say."""

    name: str
    a: float | None
    b: float | None
    interval: Interval | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Comparison:
    """name: of the point. differences: (setting, A, B). verdict: of B against A, by the headline metric.

    text: the verdict in a sentence. outcomes, fidelity: of A and of B.
    """

    name: str
    differences: list[tuple[str, str, str]]
    rows: list[Row]
    verdict: str
    text: str
    outcomes: tuple[str, str]
    fidelity: tuple[str, str]
    where: tuple[list[str], list[str]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """Settings in which two records differ, options first; then the machine, versions and code."""
    same = [group for group in GROUPS if _words(a, group) == _words(b, group)]
    sides = [_settings(record, same) for record in (a, b)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [
        (name, sides[0].get(name, "-"), sides[1].get(name, "-"))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]


def _words(record: Record, group: str) -> dict[str, str]:
    return {name: value for name, value in record["params"].items() if name.split(".")[0] == group}


def _settings(record: Record, same: list[str]) -> dict[str, str]:
    """Names as on the command line -> values. An option's own settings only as far as they are not its file's.

    same: groups that both sides name alike. There the settings that the words were composed to follow: a file of
    conf/ may have changed between two versions of the code.
    """
    found = {name: str(value) for name, value in record["params"].items()}
    sections = {name: part for name, part in record["experiment"].items() if name not in (*GROUPS, "names")}
    for name, value in _leaves(sections):
        found.setdefault(name, str(value))
    composed = _leaves({group: record["experiment"].get(group) for group in same})
    found |= {f"{name} (composed)": str(value) for name, value in composed if name not in found}
    prints = record["fingerprint"]
    found |= {f"machine.{name}": str(prints[name]) for name in _PRINTS if name in prints}
    return found | {f"versions.{name}": str(version) for name, version in prints.get("versions", {}).items()}


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def compare(a: Point, b: Point, margin: float = intervals.MARGIN) -> Comparison:
    """Two stored points. Nothing is claimed where a side has fewer than intervals.PROCESSES processes."""
    names = dict.fromkeys([*a.record["metrics"], *b.record["metrics"]])
    rows = [_row(name, a, b, margin) for name in names]
    verdict, text = _stored_verdict(a, b, {row.name: row for row in rows}, margin)
    return Comparison(
        name=a.name if a.name == b.name else f"{a.name} -> {b.name}",
        differences=differences(a.record, b.record),
        rows=rows,
        verdict=verdict,
        text=text,
        outcomes=(_outcome(a.record), _outcome(b.record)),
        fidelity=(_fidelity(a.record), _fidelity(b.record)),
        where=(a.where, b.where),
    )


def _row(name: str, a: Point, b: Point, margin: float) -> Row:
    values = a.values(name), b.values(name)
    row = Row(name, a.value(name), b.value(name))
    if not all(values) or not all(np.isfinite(value) and value > 0 for side in values for value in side):
        return row
    enough = min(map(len, values)) >= intervals.PROCESSES
    interval = intervals.of_processes(*values) if enough else _of_samples(name, a.record, b.record)
    if interval is None:
        return Row(name, row.a, row.b, Interval(float(row.b or 0) / float(row.a or 1)))
    found = _word(name, interval, margin)
    return Row(name, row.a, row.b, interval, found if enough else f"{NO_CLAIM} (samples: {found or '?'})")


def _of_samples(name: str, a: Record, b: Record) -> Interval | None:
    """What the samples of the latest processes say; None for a metric that has none."""
    if name == _RATE:  # calls a second: the inverse of the median
        time = _of_samples(HEADLINE, a, b)
        ratio = b["metrics"][name] / a["metrics"][name]
        if time is None or time.low is None or time.high is None:
            return None if time is None else Interval(ratio, reason=time.reason)
        scale = ratio * time.ratio
        return Interval(ratio, scale / time.high, scale / time.low)
    kind, _, statistic = name.rpartition("/")
    samples = a["samples"].get(kind), b["samples"].get(kind)
    if statistic not in _STATISTICS or not samples[0] or not samples[1]:
        return None
    return intervals.of_samples(samples[0], samples[1], _STATISTICS[statistic])


def _word(name: str, interval: Interval, margin: float) -> str:
    """faster and slower for times and rates; higher and lower for what is neither."""
    found = intervals.word(interval, margin)
    if name.startswith(TIMES):
        return found
    other = {intervals.SLOWER: "higher", intervals.FASTER: "lower"}
    if name == _RATE:
        other = {intervals.SLOWER: intervals.FASTER, intervals.FASTER: intervals.SLOWER}
    return other.get(found, found)


def _stored_verdict(a: Point, b: Point, rows: dict[str, Row], margin: float) -> tuple[str, str]:
    if not (a.ok and b.ok):
        failed = " and ".join(side for side, one in (("A", a), ("B", b)) if not one.ok)
        return NO_CLAIM, f"{NO_CLAIM}: {failed} has no latency, see the outcome"
    row = rows[HEADLINE]
    assert row.interval is not None
    if min(len(a.known), len(b.known)) < intervals.PROCESSES:
        found = _word(HEADLINE, row.interval, margin)
        samples = f"these samples: {found}, {ratio_text(row.interval)}" if found else row.interval.reason
        return NO_CLAIM, f"{intervals.few(len(a.known), len(b.known))} (--rerun compares in one process); {samples}"
    count = f"{len(a.known)} and {len(b.known)} processes"
    return row.verdict, f"{_sentence(row.verdict)}: {_change(row)}, {count}"


def interleaved(a: Asked, b: Asked, result: Result, found: list[Pair], margin: float = intervals.MARGIN) -> Comparison:
    """Two experiments that took turns in one process (pi0exp.interleave)."""
    prefix = f"{BASELINE}/"
    beside = {name.removeprefix(prefix): value for name, value in result.metrics.items() if name.startswith(prefix)}
    own = {name: value for name, value in result.metrics.items() if not name.startswith(prefix)}
    interval = intervals.of_rounds(found) if found else None
    rows = []
    for name in (name for name in dict.fromkeys([*beside, *own]) if name in beside and name in own):
        row = Row(name, beside[name], own[name])
        if name == HEADLINE and interval is not None:
            row = Row(name, row.a, row.b, interval, intervals.word(interval, margin))
        elif beside[name] > 0:
            row = Row(name, row.a, row.b, Interval(own[name] / beside[name]))
        rows.append(row)
    verdict, text = NO_CLAIM, f"{NO_CLAIM}: the rerun ended as {result.outcome}: {'; '.join(result.reasons)}"
    if interval is not None:
        verdict = intervals.word(interval, margin)
        [row] = [row for row in rows if row.name == HEADLINE]
        text = f"{_sentence(verdict)}: {_change(row)}, {len(found)} rounds A B B A in one process"
    outcome = str(result.outcome)
    given = [{"params": one.params, "experiment": one.experiment, "fingerprint": {}} for one in (a, b)]
    return Comparison(
        name=a.name if a.name == b.name else f"{a.name} -> {b.name}",
        differences=differences(*given),
        rows=rows,
        verdict=verdict,
        text=text,
        outcomes=(outcome, outcome),
        fidelity=(_fidelity({"metrics": beside, "numerics": ""}), _fidelity({"metrics": own, "numerics": ""})),
        where=(["this rerun"], ["this rerun"]),
    )


def _sentence(verdict: str) -> str:
    return verdict if verdict == intervals.NOTHING else f"B is {verdict}"


def _change(row: Row) -> str:
    assert row.interval is not None
    return f"{row.name} {row.a:.4g} -> {row.b:.4g}, {ratio_text(row.interval)}"


def ratio_text(interval: Interval) -> str:
    """The ratio with its interval where there is one."""
    if interval.low is None or interval.high is None:
        return f"ratio {interval.ratio:.4f}"
    return f"ratio {interval.ratio:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _outcome(record: Record) -> str:
    ok = record["outcome"] == Outcome.OK
    return str(record["outcome"]) if ok else f"{record['outcome']}: {'; '.join(record['reasons'])}"


def _fidelity(record: dict[str, Any]) -> str:
    """The declared word, and the error of the actions with plain PyTorch's."""
    metrics = record["metrics"]
    if "error/rel_l2" not in metrics:
        return record["numerics"] or "-"
    plain = [f"plain {value:.2e}" for name, value in metrics.items() if name.startswith("error/rel_l2_plain_")]
    return f"{record['numerics']} rel L2 {metrics['error/rel_l2']:.2e} ({', '.join(plain)})".strip()
