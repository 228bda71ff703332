"""The answer to a study's question in one sentence, made from its numbers alone.

Names are set in backticks. What computes something else (APPROXIMATE) is never called best, and what differs by less
than two processes of the same stack may is not called faster (pi0exp.intervals.MARGIN).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from pi0exp import intervals
from pi0exp.config import Answer, ReportConfig
from pi0exp.parity import RATED_W, target_ms
from pi0exp.report.cells import number, scale_of, text_of, time_text, title
from pi0exp.report.rows import Facet, Row, cards

MOST = 4
"""Facets that an answer goes through; the table has all."""


def answer(config: ReportConfig, found: Sequence[Facet]) -> str:
    """ "" where nothing was measured; a sentence that ends with a full stop."""
    if not any(facet.rows for facet in found):
        return ""
    told = [facet for facet in found if facet.ok]
    text = ANSWERS[config.answer](config, told) if told else ""
    return " ".join(filter(None, [text, _counted(found, always=not text)]))


def _counted(found: Sequence[Facet], always: bool) -> str:
    """How many measurements ended otherwise, how many were quick ones, and on how many GPUs."""
    rows = [row for facet in found for row in facet.rows]
    outcomes = Counter(row.record["outcome"] for row in rows)
    measured = [row for row in rows if row.ok]
    quick = sum(row.quick for row in measured)
    parts = []
    if always or set(outcomes) != {"ok"}:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        parts.append(f"{len(rows)} measurement{'s' * (len(rows) != 1)}: {counts}.")
    if quick:
        parts.append(f"{quick} of {len(measured)} in the quick form only: wider intervals.")
    if (count := len(cards(found))) > 1:
        parts.append(f"On {count} GPUs of this kind: what waits for the host is also a figure of that host.")
    return " ".join(parts)


def _each(found: Sequence[Facet], sentence: Callable[[Facet], str]) -> str:
    """A clause a facet, with its title before it where there are several."""
    clauses = [(facet.title, clause) for facet in found if (clause := sentence(facet))]
    if not clauses:
        return ""
    kept = [f"{name}: {clause}" if len(found) > 1 and name else clause for name, clause in clauses[:MOST]]
    more = f"; {len(clauses) - MOST} more in the table" if len(clauses) > MOST else ""
    text = f"{'; '.join(kept)}{more}."
    return text[0].upper() + text[1:] if kept[0] == clauses[0][1] else text


def _time(row: Row, facet: Facet) -> str:
    scale = scale_of(facet.rows)
    return f"{time_text(row.p50, scale)} {scale[1]}"


def ladder(config: ReportConfig, found: Sequence[Facet]) -> str:
    """From the first rung to the fastest, and the largest step between neighbours."""

    def sentence(facet: Facet) -> str:
        rungs = [row for row in facet.rows if row.ranked]
        if len(rungs) < 2 or facet.best is None:
            return ""
        first, best = rungs[0], facet.best
        if best is first:
            return f"no rung is faster than `{first.label}` with {_time(first, facet)}"
        steps = [(before.p50 - after.p50, after) for before, after in pairwise(rungs)]
        gain, step = max(steps, key=lambda pair: pair[0])
        scale = scale_of(facet.rows)
        return (
            f"from {_time(first, facet)} (`{first.label}`) to {_time(best, facet)} (`{best.label}`), "
            f"{first.p50 / best.p50:.2f} times as fast; the largest step is `{step.label}` "
            f"with {time_text(gain, scale)} {scale[1]} less"
        )

    return _each(found, sentence)


def fastest(config: ReportConfig, found: Sequence[Facet]) -> str:
    return _each(found, _fastest)


def _fastest(facet: Facet) -> str:
    best, ranked = facet.best, facet.ranked
    if best is None:
        return ""
    if len(ranked) == 1:
        return f"`{best.label}` takes {_time(best, facet)}"
    even = [row for row in ranked if row is not best and not _slower(best, row)]
    names = " and ".join(f"`{row.label}`" for row in (best, *even))
    verb = "is the fastest" if not even else "are the fastest, no difference seen between them,"
    text = f"{names} {verb} of {len(ranked)} with {_time(best, facet)}"
    base = facet.baseline
    if base is None or base is best or base in even:
        base = max(ranked, key=lambda row: row.p50)
    return text if base in even else f"{text}, {base.p50 / best.p50:.2f} times as fast as `{base.label}`"


def _slower(best: Row, other: Row) -> bool:
    """Beyond the margin, and its interval beyond that of the best one; without one, all but the tenth that is fastest
    beyond all but the tenth that is slowest."""
    low, high = other.interval, best.interval
    if low is None or high is None:
        low, high = _spread(other), _spread(best)
    return low[0] > high[1] and other.p50 > best.p50 * (1 + intervals.MARGIN)


def _spread(row: Row) -> tuple[float, float]:
    """The 10th and 90th percentile of its calls, in ms; of a record without them, the median alone."""
    low, high = row.metric("latency_ms/p10"), row.metric("latency_ms/p90")
    return row.p50 if low is None else low, row.p50 if high is None else high


def parity(config: ReportConfig, found: Sequence[Facet]) -> str:
    """The most calls a joule, and what rated power asks of the other kinds of GPU."""

    def sentence(facet: Facet) -> str:
        measured = [row for row in facet.rows if row.ranked and row.metric("perf_per_watt")]
        if not measured:
            return "no power was measured"
        best = max(measured, key=lambda row: row.metric("perf_per_watt") or 0.0)
        rate = number(row_value(best, "perf_per_watt"))
        text = f"`{best.label}` has the most calls a watt: {rate} calls/s/W at {_time(best, facet)}"
        if power := best.metric("power_w/mean"):
            text += f" and {power:.0f} W"
        gpu = str(best.record["fingerprint"].get("gpu", ""))
        others = [name for name in RATED_W if name != gpu] if gpu in RATED_W else []
        for other in others:
            target = target_ms(best.p50, RATED_W[gpu], RATED_W[other])
            text += (
                f"; with rated power ({RATED_W[gpu]:.0f} W, {RATED_W[other]:.0f} W) "
                f"{other} must take {target:.2f} ms or less for the same"
            )
        return text

    return _each(found, sentence)


def scaling(config: ReportConfig, found: Sequence[Facet]) -> str:
    """Along a batch the highest throughput; along anything else how the first metric grows."""
    name = config.x or "workload.batch_size"

    def at(row: Row) -> float | None:
        try:
            return float(row.record["params"][name])
        except (KeyError, ValueError):
            return None

    def sentence(facet: Facet) -> str:
        metric = "throughput_hz" if name.endswith("batch_size") else config.metrics[0]
        rows = [row for row in facet.rows if row.ranked and at(row) is not None and row.metric(metric) is not None]
        if len({at(row) for row in rows}) < 2:
            return ""
        first = min(rows, key=lambda row: (at(row) or 0.0, row.p50))
        scale, what = scale_of(facet.rows), name.rpartition(".")[2]
        start = row_value(first, metric)
        if metric == "throughput_hz":
            peak = max(rows, key=lambda row: row_value(row, metric))
            return (
                f"the highest throughput is {row_value(peak, metric):.1f} samples/s at {what} {at(peak):g} "
                f"(`{peak.label}`), {row_value(peak, metric) / start:.2f} times that at {at(first):g}"
            )
        line = [row for row in rows if all(_same(row, first, series) for series in config.series)]
        last = max(line, key=lambda row: at(row) or 0.0)
        end, unit = row_value(last, metric), f" {scale[1]}" if "_ms" in metric else ""
        ratio = f", {end / start:.2f} times" if start else ""
        return (
            f"from {what} {at(first):g} to {at(last):g} {title(metric)} goes from "
            f"{text_of(metric, start, scale)}{unit} to {text_of(metric, end, scale)}{unit}{ratio}"
        )

    return _each(found, sentence)


def _same(row: Row, other: Row, name: str) -> bool:
    return bool(row.record["params"].get(name) == other.record["params"].get(name))


def row_value(row: Row, metric: str) -> float:
    value = row.metric(metric)
    assert value is not None
    return value


def fidelity(config: ReportConfig, found: Sequence[Facet]) -> str:
    """Who keeps to plain PyTorch's own error, and what the others compute."""

    def sentence(facet: Facet) -> str:
        rows = [row for row in facet.rows if row.metric("error/rel_l2") is not None]
        same = [row for row in rows if row.ranked]
        if not rows:
            return ""
        text = f"{len(same)} of {len(rows)} keep to the bound of plain PyTorch's own error"
        if same:
            worst = max(same, key=lambda row: row_value(row, "error/rel_l2"))
            text += f", the largest being {row_value(worst, 'error/rel_l2'):.1e}{_named(worst)}"
        if others := [row for row in rows if row.approximate]:
            far = max(others, key=lambda row: row_value(row, "error/rel_l2"))
            verb = "computes" if len(others) == 1 else "compute"
            text += (
                f"; {len(others)} {verb} other actions, up to {row_value(far, 'error/rel_l2'):.1e} away{_named(far)}"
            )
        return text

    return _each(found, sentence)


def masks(config: ReportConfig, found: Sequence[Facet]) -> str:
    """The fastest of those that compute the same, and how far away the actions of the others are."""

    def sentence(facet: Facet) -> str:
        others = [
            f"`{row.label}` takes {_time(row, facet)} and computes other actions, {far:.1e} away"
            for row in facet.ok
            if row.approximate and (far := row.metric("error/rel_l2")) is not None
        ]
        return ", ".join(filter(None, [_fastest(facet), *others]))

    return _each(found, sentence)


def _named(row: Row) -> str:
    """Its name in brackets, if it is one that can be read in a sentence."""
    return f" (`{row.label}`)" if len(row.label) <= _READABLE else ""


_READABLE = 40


def parts(config: ReportConfig, found: Sequence[Facet]) -> str:
    """What each row costs against the baseline, the dearest first; the baseline's repetitions say what is noise."""

    def sentence(facet: Facet) -> str:
        base = facet.baseline
        if base is None:
            return ""
        same = [row for row in facet.ranked if row.record["params"] | _SEED == base.record["params"] | _SEED]
        low, high = min(same, key=lambda row: row.p50), max(same, key=lambda row: row.p50)
        dearer = sorted((row for row in facet.ranked if _slower(high, row)), key=lambda row: -row.p50)
        if len(same) < 2 or not dearer:
            return ""
        named = ", ".join(f"`{row.label}` {row.p50 - base.p50:+.2f} ms" for row in dearer[:MOST])
        rest = len(facet.ranked) - len(same) - len(dearer)
        return (
            f"the whole stack takes {low.p50:.2f} to {high.p50:.2f} ms on {len(same)} sets of observations; most is "
            f"lost with {named}; {len(dearer[MOST:])} more cost something, {rest} nothing that shows"
        )

    return _each(found, sentence)


_SEED = {"workload.seed": "0"}


def none(config: ReportConfig, found: Sequence[Facet]) -> str:
    return ""


ANSWERS: dict[Answer, Callable[[ReportConfig, Sequence[Facet]], str]] = {
    Answer.ladder: ladder,
    Answer.fastest: fastest,
    Answer.parity: parity,
    Answer.scaling: scaling,
    Answer.fidelity: fidelity,
    Answer.masks: masks,
    Answer.parts: parts,
    Answer.none: none,
}
