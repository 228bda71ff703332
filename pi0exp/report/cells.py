"""Numbers as text: the columns that metrics make, with their titles and units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pi0exp.experiments.tables.points import NO_ERROR, error
from pi0exp.report.rows import P50, Facet, Row

_TITLES = {
    P50: "p50",
    "latency_ms/p90": "p90",
    "latency_ms/p99": "p99",
    "latency_host_ms/p50": "host p50",
    "latency_paced_ms/p50": "paced p50",
    "throughput_hz": "samples/s",
    "roofline/share": "of roofline",
    "roofline/share_sustained": "of sustained roofline",
    "error/rel_l2": "error (plain's)",
    "error/ratio_max": "worst ratio",
    "error/ratio_mean": "mean ratio",
    "energy_j/call": "J a call",
    "power_w/mean": "mean W",
    "power_w/max": "most W",
    "perf_per_watt": "calls/s/W",
    "memory_mb/peak": "peak MB",
    "startup_s/compile": "compile s",
    "startup_s/first_call": "first call s",
    "graphs/replay_us": "replay us",
    "graphs/kernels": "kernels",
    "gpu/launches": "launches",
    "gpu/idle_share": "idle",
    "compile/breaks": "breaks",
    "compile/recompiles": "recompiles",
    "gemm/tflop_per_s": "TFLOP/s",
    "gemm/ceiling_share": "of GEMM ceiling",
    "cases/ms": "sum of cases, ms",
    "cases/tflop_per_s": "TFLOP/s",
    "cases/share": "of the ceilings",
    "cases/matrix_share": "of the matrix ceiling",
    "case_ratio/mean/eager": "eager takes x",
    "case_ratio/mean/compile": "compiled takes x",
    "case_ratio/mean/library": "libraries take x",
}
_MICRO_MS = 0.5
"""A table whose slowest latency is below is in microseconds."""
ABSENT = "-"
_NO_NUMBER = 1 / NO_ERROR
"""Ratios to an error of 0 in older records."""


@dataclass(frozen=True)
class Column:
    title: str
    cells: list[str]
    number: bool = True


def title(metric: str) -> str:
    """Of a metric that has no title of its own: its name without what it shares with its unit."""
    if metric in _TITLES:
        return _TITLES[metric]
    group, _, name = metric.partition("/")
    for start, end in (
        ("kernels_ms", ""),
        ("kernels_share", ""),
        ("stage_ms", ""),
        ("startup_s", " s"),
        ("wall_s", " s"),
    ):
        if group.startswith(start):
            return f"{group.removeprefix(start).strip('_')} {name}".strip() + end
    return metric


def is_share(metric: str) -> bool:
    return "share" in metric


def is_ms(metric: str) -> bool:
    return "_ms" in metric.split("/")[0]


def scale_of(rows: Sequence[Row]) -> tuple[float, str]:
    """(factor, unit) in which the times of these rows are shown."""
    slowest = max((row.p50 for row in rows if row.ok), default=1.0)
    return (1e3, "us") if slowest < _MICRO_MS else (1.0, "ms")


def time_text(ms: float, scale: tuple[float, str]) -> str:
    """Without its unit. Two decimals, three below a tenth."""
    value = ms * scale[0]
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def number(value: float) -> str:
    """Four digits that count, no exponent for what can be read without one."""
    if value == int(value) and abs(value) < 1e7:
        return f"{value:.0f}"
    if abs(value) >= 1e4:
        return f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3e}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def text_of(metric: str, value: float, scale: tuple[float, str]) -> str:
    if is_ms(metric):
        return time_text(value, scale)
    return f"{100 * value:.0f} %" if is_share(metric) else number(value)


def columns(facet: Facet, metrics: Sequence[str]) -> list[Column]:
    """What a table has behind the labels. The interval follows the median, the speed-up everything else."""
    rows, scale = facet.rows, scale_of(facet.rows)
    made = [] if all(not row.record["numerics"] for row in rows) else [_texts("numerics", rows, _numerics)]
    for metric in metrics:
        made.append(_metric(metric, rows, scale))
        if metric == P50:
            made.append(_texts("95 %", rows, lambda row: _interval(row, scale), number=True))
    if P50 in metrics and facet.baseline is not None and len(facet.ok) > 1:
        made.append(_texts("speed-up", rows, lambda row: _ratio(facet, row), number=True))
    alike = all(row.quick for row in rows)
    if any(remarks(row, alike) for row in rows):
        made.append(_texts("remarks", rows, lambda row: "; ".join(remarks(row, alike)) or ABSENT))
    return made


CASE = "case_"
"""Metrics of parts of a point are named case_WHAT/CASE, or case_WHAT/CASE/WHO."""


def cases(row: Row) -> list[Column]:
    """The parts of a row, such as the shapes of a kernel: a line each, a column for each figure; [] without parts."""
    found: dict[str, dict[str, str]] = {}
    for metric, value in row.record["metrics"].items():
        if not metric.startswith(CASE) or not row.ok:
            continue
        what, case, *who = metric.removeprefix(CASE).split("/")
        name = " ".join([*who, what.replace("_per_", "/").replace("tflop", "TFLOP").replace("ratio", "takes")])
        text = text_of(metric, value, (1.0, "ms"))
        found.setdefault(case, {})[name] = f"{value:.2f} x" if what == "ratio" else text
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    own = [Column(name, [figures.get(name, ABSENT) for figures in found.values()]) for name in names]
    return [Column("case", [f"`{case}`" for case in found], number=False), *own] if own else []


def _texts(name: str, rows: Sequence[Row], cell: Callable[[Row], str], number: bool = False) -> Column:
    return Column(name, [cell(row) for row in rows], number)


def _numerics(row: Row) -> str:
    return str(row.record["numerics"]) or ABSENT


def _metric(metric: str, rows: Sequence[Row], scale: tuple[float, str]) -> Column:
    name = f"{title(metric)} {scale[1]}" if is_ms(metric) else title(metric)

    def cell(row: Row) -> str:
        if metric == "error/rel_l2":
            return error(row.record["metrics"])
        if metric == P50 and not row.ok:
            return str(row.record["outcome"])
        value = row.metric(metric)
        return ABSENT if value is None or value > _NO_NUMBER else text_of(metric, value, scale)

    return Column(name, [cell(row) for row in rows])


def _interval(row: Row, scale: tuple[float, str]) -> str:
    if not row.ok or row.interval is None:
        return ABSENT
    return " to ".join(time_text(value, scale) for value in row.interval)


def _ratio(facet: Facet, row: Row) -> str:
    ratio = facet.ratio(row)
    return ABSENT if ratio is None else "1" if row is facet.baseline else f"{ratio:.2f} x"


_DOUBTS = {"warm_up": "warm-up", "median": "median", "clocks": "clocks", "processes": "others on the GPU"}
"""Facts that qualify the times: name -> words before them."""


def remarks(row: Row, alike: bool = False) -> list[str]:
    """What one must know to read the row: why it failed, that it computes something else, how it was measured.

    alike: all rows are quick, which is said of the whole.
    """
    found = [] if row.ok else [f"{row.record['outcome']}: {' '.join('; '.join(row.record['reasons']).split())}"]
    if row.ok and row.approximate:
        found.append("other actions: not ranked")
    if row.ok and row.quick and not alike:
        found.append(f"quick form, {row.calls} calls")
    facts = row.record["facts"]
    return found + [f"{words} {facts[name]}" for name, words in _DOUBTS.items() if facts.get(name)]
