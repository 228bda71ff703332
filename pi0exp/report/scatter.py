"""Plots with two axes: latency against power, error against latency, a metric along a parameter, the roofline."""

from collections.abc import Sequence

import numpy as np

from pi0exp.report.axes import Axis, Frame, axis
from pi0exp.report.cells import is_ms, is_share, scale_of, title
from pi0exp.report.rows import Facet, Row
from pi0exp.report.svg import BLUE, COLOURS, GREY, INK, MUTED, SMALL, VERMILLION, Canvas, fitted
from pi0exp.roofline import Ceilings, Rooflines
from pi0exp.roofline_plot import placed, roof
from pi0exp.subject import StageWork

WATTS = "power_w/mean"
ERROR = "error/rel_l2"


def power(canvas: Canvas, facet: Facet) -> None:
    """Mean watts against latency. Along the line a call takes the energy of the baseline's; below it, less."""
    rows = [row for row in facet.ok if row.metric(WATTS)]
    scale, unit = scale_of(rows)
    times, watts = [row.p50 * scale for row in rows], [row.metric(WATTS) or 0.0 for row in rows]
    frame = Frame(canvas, _times(times), axis(watts))
    frame.draw(f"latency p50, {unit}", "mean power, W")
    base = facet.baseline if facet.baseline in rows else rows[0]
    energy = (base.metric(WATTS) or 0.0) * base.p50 * scale
    along = np.geomspace(max(frame.x_axis.low, 1e-3 * frame.x_axis.high), frame.x_axis.high, 300)
    line = [(frame.x(x), frame.y(energy / x)) for x in along if x > 0 and frame.inside(x, energy / x)]
    canvas.path(line, VERMILLION, 1.6, "6 4")
    for row, x, y in zip(rows, times, watts, strict=True):
        _interval(canvas, frame, row, scale, frame.y(y))
        canvas.dot(frame.x(x), frame.y(y), BLUE, f"{row.label}: {x:.2f} {unit}, {y:.0f} W", row.approximate)
    frame.name([(frame.x(x), frame.y(y), row.label) for row, x, y in zip(rows, times, watts, strict=True)])
    frame.key([f"parity: as many joules a call as {base.label}"], [VERMILLION])


def _times(values: Sequence[float]) -> Axis:
    """Logarithmic where eager PyTorch would push all others into a corner."""
    return axis(values, log=max(values) > 4 * min(values))


def pareto(canvas: Canvas, facet: Facet) -> None:
    """Error against latency. The line joins the points that no other one beats in both; hollow: other actions."""
    rows = [row for row in facet.ok if (row.metric(ERROR) or 0.0) > 0]
    scale, unit = scale_of(rows)
    errors = [row.metric(ERROR) or 0.0 for row in rows]
    plain = _plain_error(rows)
    frame = Frame(
        canvas, _times([row.p50 * scale for row in rows]), axis([*errors, *([plain] if plain else [])], log=True)
    )
    frame.draw(f"latency p50, {unit}", "error of the actions, relative L2")
    if plain:
        canvas.line(frame.left, frame.y(plain), frame.right, frame.y(plain), GREY, 1.4, "2 3")
    canvas.path([(frame.x(row.p50 * scale), frame.y(row.metric(ERROR) or 0.0)) for row in front(rows)], BLUE, 1.6)
    for row, error in zip(rows, errors, strict=True):
        x, y = frame.x(row.p50 * scale), frame.y(error)
        _interval(canvas, frame, row, scale, y)
        colour = VERMILLION if row.approximate else BLUE
        canvas.dot(x, y, colour, f"{row.label}: {row.p50 * scale:.2f} {unit}, error {error:.1e}", row.approximate)
    frame.name([(frame.x(row.p50 * scale), frame.y(e), row.label) for row, e in zip(rows, errors, strict=True)])
    if plain:
        frame.key([f"plain PyTorch in the same precision: {plain:.1e}"], [GREY])


def _plain_error(rows: Sequence[Row]) -> float | None:
    """The largest of the plain models' own errors; None where there is none above 0."""
    found = [float(v) for row in rows for n, v in row.record["metrics"].items() if n.startswith(f"{ERROR}_plain_")]
    return max((value for value in found if value > 1e-12), default=None)


def front(rows: Sequence[Row]) -> list[Row]:
    """Those that no other row beats in latency and error, fastest first. What computes other actions is not asked."""
    kept: list[Row] = []
    for row in sorted((row for row in rows if row.ranked), key=lambda row: (row.p50, row.metric(ERROR) or 0.0)):
        if not kept or (row.metric(ERROR) or 0.0) < (kept[-1].metric(ERROR) or 0.0):
            kept.append(row)
    return kept


def _interval(canvas: Canvas, frame: Frame, row: Row, scale: float, y: float) -> None:
    if row.interval is not None:
        canvas.whisker(frame.x(max(row.interval[0] * scale, frame.x_axis.low)), frame.x(row.interval[1] * scale), y)


Line = tuple[str, list[tuple[float, Row]]]
"""Its name, and its points: the parameter and the row."""


def lines(facets: Sequence[Facet], name: str, series: Sequence[str]) -> list[Line]:
    """A line a facet and value of the series, each along the parameter `name`; rows without such a number are out."""
    found: dict[str, list[tuple[float, Row]]] = {}
    for facet in facets:
        for row in facet.ok:
            params = row.record["params"]
            try:
                x = float(params[name])
            except (KeyError, ValueError):
                continue
            own = " ".join(str(params.get(one, "-")) for one in series)
            text = " ".join(filter(None, [facet.title if len(facets) > 1 or not own else "", own]))
            found.setdefault(text, []).append((x, row))
    return [(text, sorted(points, key=lambda point: point[0])) for text, points in found.items()]


def curve(canvas: Canvas, metric: str, name: str, found: Sequence[Line]) -> None:
    """A metric along a parameter, one line a series, each value with its interval if it has one."""
    scale, unit = scale_of([row for _, points in found for _, row in points])
    factor = scale if is_ms(metric) else 100.0 if is_share(metric) else 1.0
    given = [(text, [(x, row, row.metric(metric)) for x, row in points]) for text, points in found]
    values = [y * factor for _, points in given for _, _, y in points if y is not None]
    xs = [x for _, points in given for x, _, y in points if y is not None]
    wide_x = min(xs) > 0 and max(xs) / min(xs) >= 8
    wide_y = min(values) > 0 and max(values) / min(values) >= 30
    frame = Frame(
        canvas, axis(xs, log=wide_x), axis(values, log=True) if wide_y else axis(values, zero=min(values) >= 0)
    )
    suffix = f", {unit}" if is_ms(metric) else ", %" if is_share(metric) else ""
    frame.draw(name, title(metric) + suffix)
    for i, (text, points) in enumerate(given):
        colour = COLOURS[i % len(COLOURS)]
        places = [(frame.x(x), frame.y(y * factor), row, y) for x, row, y in points if y is not None]
        canvas.path([(x, y) for x, y, _, _ in places], colour, dash=_DASHES[i // len(COLOURS) % len(_DASHES)])
        for x, y, row, value in places:
            if (known := row.interval_of(metric)) is not None:
                low, high = (min(max(v * factor, frame.y_axis.low), frame.y_axis.high) for v in known)
                canvas.whisker(frame.y(low), frame.y(high), x, upright=True)
            canvas.dot(x, y, colour, f"{text} {row.label}: {value * factor:.4g}{suffix.strip(',')}", row.approximate, 4)
    frame.key([text or title(metric) for text, _ in given], [COLOURS[i % len(COLOURS)] for i in range(len(given))])


_DASHES = ("", "7 3", "2 3")


def roofline(canvas: Canvas, found: Sequence[tuple[str, list[StageWork], Rooflines, dict[str, float]]]) -> None:
    """What the GPU allows at each intensity, and where the call and its stages stand; a colour a row.

    found: name, work, ceilings, times of a row. The roofs are those of the first.
    """
    roofs = found[0][2]
    points = [(name, stage, *at) for name, work, _, timed in found for stage, at in placed(work, timed).items()]
    ridge = roofs.burst.flops_per_s / roofs.burst.bytes_per_s
    xs, ys = [ridge, *(x for *_, x, _ in points)], [y / 1e12 for *_, y in points]
    frame = Frame(canvas, axis(xs, log=True), axis([*ys, roofs.burst.flops_per_s / 1e12], log=True))
    frame.draw("FLOP per byte of the least work", "TFLOP/s reached")
    along = np.geomspace(frame.x_axis.low, frame.x_axis.high, 200)
    for ceilings, dash in ((roofs.burst, ""), (roofs.sustained, "6 4")):
        _roof(canvas, frame, ceilings, along, dash)
    colours = {name: COLOURS[i % len(COLOURS)] for i, (name, *_) in enumerate(found)}
    for name, stage, x, y in points:
        told = f"{name}, {stage}: {y / 1e12:.1f} TFLOP/s"
        canvas.dot(frame.x(x), frame.y(y / 1e12), colours[name], told, radius=6 if stage == "call" else 4.5)
        frame.occupy(frame.x(x), frame.y(y / 1e12))
    tops = {stage: (x, y) for _, stage, x, y in sorted(points, key=lambda point: point[3])}
    named = [(frame.x(x), frame.y(y / 1e12), stage) for stage, (x, y) in tops.items()]
    for (x, y), (_, _, stage) in zip(frame.places(named) or [(x - 8, y - 9) for x, y, _ in named], named, strict=True):
        canvas.text(x, y, stage, SMALL, MUTED)
    frame.key([fitted(name, canvas.width, SMALL) for name in colours], list(colours.values()))
    if roofs.sustained != roofs.burst:
        frame.key(["dashed: kept up for a second or more"])


def _roof(canvas: Canvas, frame: Frame, ceilings: Ceilings, along: Sequence[float] | np.ndarray, dash: str) -> None:
    places = [(x, roof(ceilings, float(x)) / 1e12) for x in along]
    inside = [(frame.x(float(x)), frame.y(y)) for x, y in places if frame.inside(float(x), y)]
    canvas.path(inside, INK, 1.6, dash)
