"""Two measured points side by side: what differs in the configuration, every metric, and what may be claimed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pi0exp import intervals
from pi0exp.differences import differences, other_work
from pi0exp.interleave import BASELINE, Pair
from pi0exp.intervals import Floats, Interval, Statistic
from pi0exp.operands import Asked, Point, identity
from pi0exp.result import Outcome, Result
from pi0exp.track import Record

HEADLINE = "latency_ms/p50"
NO_CLAIM = "no claim"
TIMES = ("latency", "stage_ms/", "kernels_ms/", "startup_s/", "graphs/replay_us")
"""Prefixes of metrics of which less is faster."""
_SPREADS = ("_share", "/std")
"""Ends of names that begin like times and are none."""
_RATE = "throughput_hz"
_OF_BOTH = ("memory_mb/", "rounds/", "clock_mhz/", "temperature_c/")
"""What a rerun has once: both are resident."""
_TAKEN = "latency_ms"
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

    text: the verdict in a sentence. outcomes, fidelity, where: of A and of B. Of a rerun also samples, facts and
    fingerprint, which are stored nowhere else.
    """

    name: str
    differences: list[tuple[str, str, str]]
    rows: list[Row]
    verdict: str
    text: str
    outcomes: tuple[str, str]
    fidelity: tuple[str, str]
    where: tuple[list[str], list[str]]
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    if name.startswith(TIMES) and not name.endswith(_SPREADS):
        return found
    other = {intervals.SLOWER: "higher", intervals.FASTER: "lower"}
    if name == _RATE:
        other = {intervals.SLOWER: intervals.FASTER, intervals.FASTER: intervals.SLOWER}
    return other.get(found, found)


def _stored_verdict(a: Point, b: Point, rows: dict[str, Row], margin: float) -> tuple[str, str]:
    if shared := {identity(one.record) for one in a.known} & {identity(one.record) for one in b.known}:
        return NO_CLAIM, f"{NO_CLAIM}: {len(shared)} of the measurements is A's and B's, both must have their own"
    if not (a.ok and b.ok):
        failed = " and ".join(side for side, one in (("A", a), ("B", b)) if not one.ok)
        return NO_CLAIM, f"{NO_CLAIM}: {failed} has no latency, see the outcome"
    row = rows[HEADLINE]
    assert row.interval is not None
    if min(len(a.known), len(b.known)) < intervals.PROCESSES:
        found = _word(HEADLINE, row.interval, margin)
        samples = f"these samples: {found}, {ratio_text(row.interval)}" if found else row.interval.reason
        few = intervals.few(len(a.known), len(b.known))
        return NO_CLAIM, f"{few} (--rerun compares in one process); {samples}{_apart(a.record, b.record)}"
    count = f"{len(a.known)} and {len(b.known)} processes{_apart(a.record, b.record)}"
    return row.verdict, f"{_sentence(row.verdict)}: {_change(row)}, {count}"


def interleaved(a: Asked, b: Asked, result: Result, found: list[Pair], margin: float = intervals.MARGIN) -> Comparison:
    """Two experiments that took turns in one process (pi0exp.interleave). found: a pair for each round."""
    prefix = f"{BASELINE}/"
    beside = {name.removeprefix(prefix): value for name, value in result.metrics.items() if name.startswith(prefix)}
    own = {name: value for name, value in result.metrics.items() if not name.startswith((prefix, *_OF_BOTH))}
    taken = (result.samples.get(name, []) for name in (f"{BASELINE}_{_TAKEN}", _TAKEN))
    rounds = (_rounds(next(taken), len(found)), _rounds(next(taken), len(found)))
    rows = [
        _turns_row(name, beside.get(name), own.get(name), found, rounds, margin)
        for name in dict.fromkeys([*beside, *own])
    ]
    verdict, text = NO_CLAIM, f"{NO_CLAIM}: the rerun ended as {result.outcome}: {'; '.join(result.reasons)}"
    given = [{"params": one.params, "experiment": one.experiment, "fingerprint": {}} for one in (a, b)]
    if found:
        [row] = [row for row in rows if row.name == HEADLINE]
        verdict = row.verdict
        text = f"{_sentence(verdict)}: {_change(row)}, {len(found)} rounds A B B A in one process{_apart(*given)}"
    return Comparison(
        name=a.name if a.name == b.name else f"{a.name} -> {b.name}",
        differences=differences(*given),
        rows=rows,
        verdict=verdict,
        text=text,
        outcomes=(_side("A", result), _side("B", result)),
        fidelity=(
            _fidelity({"metrics": beside, "numerics": a.numerics}),
            _fidelity({"metrics": own, "numerics": b.numerics}),
        ),
        where=(["this rerun"], ["this rerun"]),
        samples=result.samples,
        facts=result.facts,
        fingerprint=result.fingerprint,
    )


def _rounds(samples: list[float], rounds: int) -> Floats:
    """[rounds, calls of a round]."""
    return np.array(samples).reshape(rounds, -1) if rounds else np.zeros((0, 0))


def _turns_row(
    name: str, a: float | None, b: float | None, found: list[Pair], rounds: tuple[Floats, Floats], margin: float
) -> Row:
    """The headline by the pairs of medians, other statistics of the samples by whole rounds."""
    if a is None or b is None or min(a, b) <= 0:
        return Row(name, a, b)
    kind, _, statistic = name.rpartition("/")
    if not found or f"{kind}/" != "latency_ms/" or statistic not in _STATISTICS:
        return Row(name, a, b, Interval(b / a))
    if name == HEADLINE:
        interval = intervals.of_rounds(found)
    else:
        interval = intervals.of_round_samples(*rounds, _STATISTICS[statistic])
    return Row(name, a, b, interval, intervals.word(interval, margin))


def _side(side: str, result: Result) -> str:
    """How one of a pair ended. Reasons begin with the side that they are of; without one they are of both."""
    if result.outcome is Outcome.OK:
        return str(result.outcome)
    told = {name: [reason for reason in result.reasons if reason.startswith(f"{name}: ")] for name in "AB"}
    if not told["A"] and not told["B"]:
        return f"{result.outcome}: {'; '.join(result.reasons)}"
    own = [reason.removeprefix(f"{side}: ") for reason in told[side]]
    return f"{result.outcome}: {'; '.join(own)}" if own else "no result"


def _apart(a: Record, b: Record) -> str:
    """Behind a verdict on two that did not compute the same."""
    names = other_work(a, b)
    return f"; of other work: {', '.join(names)}" if names else ""


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
