"""Plots with a lane a row: latencies with their intervals, the steps of a ladder, kernel time by category."""

from collections.abc import Callable, Sequence

from pi0exp.kernel_table import CATEGORIES
from pi0exp.report.axes import Axis, legend, tick_text
from pi0exp.report.cells import scale_of, time_text
from pi0exp.report.rows import Facet, Row
from pi0exp.report.svg import (
    BLUE,
    COLOURS,
    GREEN,
    INK,
    MUTED,
    ON,
    SMALL,
    VERMILLION,
    Canvas,
    fitted,
    width_of,
)

KERNEL_COLOURS = dict(zip(CATEGORIES, COLOURS, strict=True))
_TOP = 8.0


class Lanes:
    """A lane a row: its name at the left, above the lane where it is narrow, and a value to the right of the bars.

    room: pixels that such a value may take where it is narrow.
    """

    def __init__(self, canvas: Canvas, axis: Axis, top: float = _TOP, room: float = 96.0) -> None:
        self.canvas, self.axis, self.top = canvas, axis, top
        self.left = 8.0 if canvas.narrow else 270.0
        self.right = canvas.width - (room if canvas.narrow else 150.0)
        self.pitch, self.height = (46.0, 16.0) if canvas.narrow else (30.0, 18.0)
        self.count = 0

    def x(self, value: float) -> float:
        """Of a value beyond the axis: its end."""
        return self.left + self.axis.place(min(value, self.axis.high)) * (self.right - self.left)

    def bar(self, low: float, high: float, y: float, colour: str, title: str, hollow: bool = False) -> None:
        """From one value to the other; cut, with a mark, where it goes on beyond the axis."""
        x, end = self.x(low), self.x(high)
        self.canvas.bar(x, y, end - x, self.height, colour, title, hollow)
        if high > self.axis.high:
            self.canvas.break_mark(end, y, self.height)

    def whisker(self, row: Row, scale: float, y: float) -> float:
        """The interval of the median over the bar at y; where what stands beside the bar may begin."""
        if row.interval is None or row.interval[1] * scale > self.axis.high:
            return self.x(row.p50 * scale)
        low, high = (self.x(value * scale) for value in row.interval)
        self.canvas.whisker(low, high, y + self.height / 2)
        return max(high, self.x(row.p50 * scale))

    def next(self, name: str, bold: bool = False) -> float:
        """The top of the next lane's bar, its name written."""
        y = self.top + self.count * self.pitch + (22 if self.canvas.narrow else 6)
        self.count += 1
        if self.canvas.narrow:
            self.canvas.text(8, y - 6, fitted(name, self.canvas.width - 16, bold=bold), bold=bold)
        else:
            self.canvas.text(self.left - 10, y + 14, fitted(name, self.left - 14, bold=bold), anchor="end", bold=bold)
        return y

    @property
    def bottom(self) -> float:
        return self.top + self.count * self.pitch + 8

    def grid(self, rows: int, unit: str) -> None:
        """Behind the bars of so many rows: call it first."""
        bottom = self.top + rows * self.pitch + 8
        for value in self.axis.ticks(4 if self.canvas.narrow else 8):
            self.canvas.line(self.x(value), self.top, self.x(value), bottom)
            self.canvas.text(self.x(value), bottom + 16, tick_text(value), SMALL, MUTED, "middle")
        self.canvas.line(self.left, self.top, self.left, bottom, INK)
        self.canvas.text(self.right + 12, bottom + 16, unit, SMALL, MUTED)
        self.canvas.height = bottom + 26


_CUT = 2.5
"""A value so many times the next one is cut: otherwise it would leave no room for the others."""


def reach(values: Sequence[float]) -> Axis:
    """From 0 to the largest value, or as far as most of them go."""
    *others, largest = sorted(values)
    return Axis(0.0, 1.3 * others[-1] if len(others) > 1 and largest > _CUT * others[-1] else 1.02 * largest)


def value_text(facet: Facet, row: Row) -> str:
    """The median, and how many times as fast as the baseline it is."""
    text, ratio = time_text(row.p50, scale_of(facet.rows)), facet.ratio(row)
    return text if ratio is None or row is facet.baseline else f"{text} · {ratio:.2f} x"


def name_of(row: Row) -> str:
    return f"≈ {row.label}" if row.approximate else row.label


def failed(lanes: Lanes, row: Row, y: float) -> None:
    """What stands where a row has no bar."""
    reasons = "; ".join(row.record["reasons"])
    room = lanes.canvas.width - lanes.left - 12
    text = fitted(f"{row.record['outcome']}: {reasons}", room, SMALL)
    lanes.canvas.text(lanes.left + 6, y + 13, text, SMALL, MUTED)


def bars(canvas: Canvas, facet: Facet, colour_of: Callable[[Row], str], key: Sequence[tuple[str, str]]) -> None:
    """Latency a row. Hollow: computes other actions. Whisker: 95 % interval of the median."""
    scale, unit = scale_of(facet.rows)
    top = legend(canvas, 8, 18, key) if key else _TOP
    widest = max((width_of(value_text(facet, row), bold=row is facet.best) for row in facet.ok), default=0.0)
    lanes = Lanes(canvas, reach(_ends(facet, scale)), top, room=max(96.0, widest + 16))
    lanes.grid(len(facet.rows), unit)
    for row in facet.rows:
        y = lanes.next(name_of(row), bold=row is facet.best)
        if not row.ok:
            failed(lanes, row, y)
            continue
        lanes.bar(0.0, row.p50 * scale, y, colour_of(row), _told(facet, row), row.approximate)
        edge = lanes.whisker(row, scale, y)
        canvas.text(edge + 8, y + 13, value_text(facet, row), bold=row is facet.best)


def _ends(facet: Facet, scale: float) -> list[float]:
    return [max(row.p50, row.interval[1] if row.interval else 0.0) * scale for row in facet.ok]


def _told(facet: Facet, row: Row) -> str:
    scale = scale_of(facet.rows)
    text = f"{row.label}: p50 {time_text(row.p50, scale)} {scale[1]}"
    if row.interval is not None:
        text += ", 95 % " + " to ".join(time_text(value, scale) for value in row.interval)
    return text


def waterfall(canvas: Canvas, facet: Facet) -> None:
    """The first rung from 0; then what each one takes off (green) or adds (vermillion); the last one from 0 again."""
    scale, unit = scale_of(facet.rows)
    top = legend(canvas, 8, 18, [("whole call", BLUE), ("faster by", GREEN), ("slower by", VERMILLION)])
    lanes = Lanes(canvas, reach(_ends(facet, scale)), top, room=136.0)
    ranked = [row for row in facet.rows if row.ranked]
    lanes.grid(len(facet.rows) + (len(ranked) > 1), unit)
    before: Row | None = None
    below = 0.0
    for row in facet.rows:
        y = lanes.next(name_of(row))
        if not row.ok:
            failed(lanes, row, y)
            continue
        now, edge = row.p50 * scale, lanes.x(row.p50 * scale)
        if row.approximate or before is None:
            lanes.bar(0.0, now, y, BLUE, _told(facet, row), row.approximate)
            text = time_text(row.p50, (scale, unit))
        else:
            then, faster = before.p50 * scale, row.p50 < before.p50
            lanes.bar(min(now, then), max(now, then), y, GREEN if faster else VERMILLION, _told(facet, row))
            step, total = (time_text(value, (scale, unit)) for value in (abs(row.p50 - before.p50), row.p50))
            edge, text = lanes.x(max(now, then)), f"{'−' if faster else '+'}{step} → {total}"
            # From where the rung before ended down to this lane.
            canvas.line(lanes.x(then), below, lanes.x(then), y, MUTED, 1.0, "2 2")
        edge = max(edge, lanes.whisker(row, scale, y))
        canvas.text(edge + 8, y + 13, text)
        if row.ranked:
            before, below = row, y + lanes.height
    if len(ranked) > 1:
        last, first = ranked[-1], ranked[0]
        y = lanes.next("all of them", bold=True)
        lanes.bar(0.0, last.p50 * scale, y, BLUE, _told(facet, last))
        text = f"{time_text(last.p50, (scale, unit))} {unit}, {first.p50 / last.p50:.2f} x"
        canvas.text(lanes.x(last.p50 * scale) + 8, y + 13, text, bold=True)


def kernels(canvas: Canvas, facet: Facet) -> None:
    """Kernel time by category, stacked; a mark at the latency of the same run: what lies between is no kernel's."""
    scale, unit = scale_of(facet.rows)
    rows = [row for row in facet.rows if row.ok and kernel_ms(row)]
    there = [name for name in CATEGORIES if any(kernel_ms(row).get(name, 0.0) > 0 for row in rows)]
    top = legend(canvas, 8, 18, [*((name, KERNEL_COLOURS[name]) for name in there), ("| latency", INK)])
    lanes = Lanes(canvas, reach([max(sum(kernel_ms(row).values()), row.p50) * scale for row in rows]), top)
    lanes.grid(len(rows), unit)
    for row in rows:
        y, at = lanes.next(name_of(row), bold=row is facet.best), 0.0
        total = sum(kernel_ms(row).values())
        for name in there:
            spent = kernel_ms(row).get(name, 0.0)
            if spent <= 0:
                continue
            x, end = lanes.x(at * scale), lanes.x((at + spent) * scale)
            told = f"{row.label}: {name} {time_text(spent, (scale, unit))} {unit}, {100 * spent / total:.0f} %"
            if end > x:
                canvas.bar(x, y, end - x, lanes.height, KERNEL_COLOURS[name], told)
            share = f"{100 * spent / total:.0f} %"
            if end - x > width_of(share, SMALL) + 6:
                ink = ON[CATEGORIES.index(name)]
                canvas.text((x + end) / 2, y + 13, share, SMALL, ink, "middle")
            at += spent
        if max(total, row.p50) * scale > lanes.axis.high:
            canvas.break_mark(lanes.x(total * scale), y, lanes.height)
        mark = lanes.x(row.p50 * scale)
        if row.p50 * scale <= lanes.axis.high:
            canvas.line(mark, y - 3, mark, y + lanes.height + 3, INK, 2)
        canvas.text(max(mark, lanes.x(at * scale)) + 8, y + 13, f"{time_text(total, (scale, unit))} {unit}")


def kernel_ms(row: Row) -> dict[str, float]:
    """Category -> ms of a call; empty where the run has no profile."""
    found = {name: row.metric(f"kernels_ms/{name}") for name in CATEGORIES}
    return {name: value for name, value in found.items() if value is not None}


def colour_by(rows: Sequence[Row], series: Sequence[str]) -> tuple[Callable[[Row], str], list[tuple[str, str]]]:
    """The colour of a row by these parameters, and the key to it; without series one blue."""

    def value(row: Row) -> str:
        return " ".join(str(row.record["params"].get(name, "-")) for name in series)

    if not series:
        return lambda row: BLUE, []
    colours = {text: COLOURS[i % len(COLOURS)] for i, text in enumerate(dict.fromkeys(map(value, rows)))}
    return lambda row: colours[value(row)], list(colours.items())
