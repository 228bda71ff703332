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
    """A lane a row: its name at the left, above the lane where it is narrow, and a value to the right of the bars."""

    def __init__(self, canvas: Canvas, axis: Axis, top: float = _TOP) -> None:
        self.canvas, self.axis, self.top = canvas, axis, top
        self.left = 8.0 if canvas.narrow else 270.0
        self.right = canvas.width - (96.0 if canvas.narrow else 150.0)
        self.pitch, self.height = (46.0, 16.0) if canvas.narrow else (30.0, 18.0)
        self.count = 0

    def x(self, value: float) -> float:
        return self.left + self.axis.place(value) * (self.right - self.left)

    def next(self, name: str, bold: bool = False) -> float:
        """The top of the next lane's bar, its name written."""
        y = self.top + self.count * self.pitch + (22 if self.canvas.narrow else 6)
        self.count += 1
        if self.canvas.narrow:
            self.canvas.text(8, y - 6, fitted(name, self.canvas.width - 16), bold=bold)
        else:
            self.canvas.text(self.left - 10, y + 14, fitted(name, self.left - 18), anchor="end", bold=bold)
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


def value_text(facet: Facet, row: Row) -> str:
    """The median, and how many times as fast as the baseline it is."""
    text, ratio = time_text(row.p50, scale_of(facet.rows)), facet.ratio(row)
    return text if ratio is None or row is facet.baseline else f"{text}  {ratio:.2f} x"


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
    highest = max((row.interval or (0.0, row.p50))[1] for row in facet.ok)
    lanes = Lanes(canvas, Axis(0.0, max(highest, max(row.p50 for row in facet.ok)) * scale * 1.02), top)
    lanes.grid(len(facet.rows), unit)
    for row in facet.rows:
        y = lanes.next(name_of(row), bold=row is facet.best)
        if not row.ok:
            failed(lanes, row, y)
            continue
        end = lanes.x(row.p50 * scale)
        canvas.bar(lanes.left, y, end - lanes.left, lanes.height, colour_of(row), _told(facet, row), row.approximate)
        edge = end
        if row.interval is not None:
            low, high = (lanes.x(value * scale) for value in row.interval)
            canvas.whisker(low, high, y + lanes.height / 2)
            edge = max(end, high)
        canvas.text(edge + 8, y + 13, value_text(facet, row), bold=row is facet.best)


def _told(facet: Facet, row: Row) -> str:
    scale = scale_of(facet.rows)
    text = f"{row.label}: p50 {time_text(row.p50, scale)} {scale[1]}"
    if row.interval is not None:
        text += ", 95 % " + " to ".join(time_text(value, scale) for value in row.interval)
    return text


def waterfall(canvas: Canvas, facet: Facet) -> None:
    """The first rung from 0; then what each one takes off (green) or adds (vermillion); the last one from 0 again."""
    scale, unit = scale_of(facet.rows)
    highest = max((row.interval or (0.0, 0.0))[1] for row in facet.ok)
    top = legend(canvas, 8, 18, [("whole call", BLUE), ("faster by", GREEN), ("slower by", VERMILLION)])
    lanes = Lanes(canvas, Axis(0.0, max(highest, max(row.p50 for row in facet.ok)) * scale * 1.02), top)
    ranked = [row for row in facet.rows if row.ranked]
    lanes.grid(len(facet.rows) + (len(ranked) > 1), unit)
    before: Row | None = None
    for row in facet.rows:
        y = lanes.next(name_of(row))
        if not row.ok:
            failed(lanes, row, y)
            continue
        now = lanes.x(row.p50 * scale)
        if row.approximate or before is None:
            canvas.bar(lanes.left, y, now - lanes.left, lanes.height, BLUE, _told(facet, row), row.approximate)
            edge, text = now, time_text(row.p50, (scale, unit))
        else:
            then, change = lanes.x(before.p50 * scale), row.p50 - before.p50
            colour = GREEN if change < 0 else VERMILLION
            canvas.bar(min(now, then), y, abs(now - then), lanes.height, colour, _told(facet, row))
            edge = max(now, then)
            step, total = (time_text(value, (scale, unit)) for value in (abs(change), row.p50))
            text = f"{'−' if change < 0 else '+'}{step}  {total}"
            # From where the rung before ended down to this lane.
            canvas.line(then, y - (lanes.pitch - lanes.height), then, y, MUTED, 1.0, "2 2")
        if row.interval is not None:
            low, high = (lanes.x(value * scale) for value in row.interval)
            canvas.whisker(low, high, y + lanes.height / 2)
            edge = max(edge, high)
        canvas.text(edge + 8, y + 13, text)
        before = row if row.ranked else before
    if len(ranked) > 1:
        last, first = ranked[-1], ranked[0]
        y = lanes.next("all of them", bold=True)
        end = lanes.x(last.p50 * scale)
        canvas.bar(lanes.left, y, end - lanes.left, lanes.height, BLUE, _told(facet, last))
        text = f"{time_text(last.p50, (scale, unit))} {unit}, {first.p50 / last.p50:.2f} x"
        canvas.text(end + 8, y + 13, text, bold=True)


def kernels(canvas: Canvas, facet: Facet) -> None:
    """Kernel time by category, stacked; a mark at the latency of the same run: what lies between is no kernel's."""
    scale, unit = scale_of(facet.rows)
    rows = [row for row in facet.rows if row.ok and kernel_ms(row)]
    there = [name for name in CATEGORIES if any(kernel_ms(row).get(name, 0.0) > 0 for row in rows)]
    top = legend(canvas, 8, 18, [*((name, KERNEL_COLOURS[name]) for name in there), ("| latency", INK)])
    longest = max(max(sum(kernel_ms(row).values()), row.p50) for row in rows)
    lanes = Lanes(canvas, Axis(0.0, longest * scale * 1.02), top)
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
            canvas.bar(x, y, end - x, lanes.height, KERNEL_COLOURS[name], told)
            share = f"{100 * spent / total:.0f} %"
            if end - x > width_of(share, SMALL) + 6:
                ink = ON[CATEGORIES.index(name)]
                canvas.text((x + end) / 2, y + 13, share, SMALL, ink, "middle")
            at += spent
        mark = lanes.x(row.p50 * scale)
        canvas.line(mark, y - 3, mark, y + lanes.height + 3, INK, 2)
        canvas.text(max(mark, lanes.x(at * scale)) + 8, y + 13, f"{time_text(total, (scale, unit))} of kernels")


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
