"""The plots that a study may name in `report.plots`: each makes pictures of facets, or says why there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pi0exp import subject
from pi0exp.config import ReportConfig
from pi0exp.errors import UserError
from pi0exp.report import bars, scatter
from pi0exp.report.cells import title
from pi0exp.report.rows import Facet, Row
from pi0exp.report.svg import NARROW, WIDE, Canvas
from pi0exp.roofline import Ceilings, Rooflines


@dataclass(frozen=True)
class Plot:
    """A picture: title above it, caption below it. draw: None where there is nothing to draw, for the `reason`."""

    title: str
    caption: str
    draw: Callable[[Canvas], None] | None = None
    reason: str = ""

    def svg(self, width: float = WIDE, alone: bool = False) -> str:
        assert self.draw is not None
        canvas = Canvas(width)
        self.draw(canvas)
        return canvas.svg(self.title, "narrow" if width == NARROW else "wide", alone)


def _each(
    what: str,
    caption: str,
    found: Sequence[Facet],
    usable: Callable[[Facet], bool],
    draw: Callable[[Canvas, Facet], None],
    lacking: str,
) -> list[Plot]:
    """A picture a facet; one reason for all facets without one."""
    made, without = [], []
    for facet in found:
        if len(facet.rows) == 1 and len(found) > 1:
            continue  # its table says it all
        if facet.ok and usable(facet):
            made.append(Plot(" · ".join(filter(None, [what, facet.title])), caption, _on(facet, draw)))
        else:
            without.append(facet.title)
    if without:
        named = "" if len(without) == len(found) else f" ({', '.join(filter(None, without))})"
        made.append(Plot(f"{what}{named}", "", reason=lacking))
    return made


def _on(facet: Facet, draw: Callable[[Canvas, Facet], None]) -> Callable[[Canvas], None]:
    return lambda canvas: draw(canvas, facet)


INTERVALS = (
    "Whiskers: 95 % confidence interval of the median. Hollow and ≈: computes other actions, not ranked. A bar with a "
    "gap is cut short; its number is whole."
)
SPOTS = "Whiskers: 95 % confidence interval of the median. Hollow: computes other actions, not ranked."
NO_LATENCY = "nothing to draw: no point has a latency"


def latency_bars(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    def draw(canvas: Canvas, facet: Facet) -> None:
        colour, key = bars.colour_by([row for one in found for row in one.rows], config.series)
        bars.bars(canvas, facet, colour, key)

    return _each("Latency", INTERVALS, found, lambda facet: True, draw, NO_LATENCY)


def waterfall(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    caption = f"Each rung keeps those above it. {INTERVALS}"
    return _each("What each step brings", caption, found, lambda facet: True, bars.waterfall, NO_LATENCY)


def kernels(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    caption = (
        "GPU time of one call by kind of kernel, from a profile. The upright mark is the latency without a profiler: "
        "beyond the bar the GPU waits; before its end, the profiler slows it. No instant is counted twice."
    )
    lacking = "nothing to draw: no point carries a profile of its kernels"
    return _each(
        "Where the GPU's time goes",
        caption,
        found,
        lambda facet: any(bars.kernel_ms(row) for row in facet.ok),
        bars.kernels,
        lacking,
    )


def power(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    caption = f"Points below the dashed line take less energy a call. {SPOTS}"
    return _each(
        "Latency and power",
        caption,
        found,
        lambda facet: any(row.metric(scatter.WATTS) for row in facet.ok),
        scatter.power,
        "nothing to draw: no point carries its power",
    )


def pareto(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    caption = f"The line joins the points that none beats in both latency and error. {SPOTS}"
    return _each(
        "Fidelity and latency",
        caption,
        found,
        lambda facet: any((row.metric(scatter.ERROR) or 0) > 0 for row in facet.ok),
        scatter.pareto,
        "nothing to draw: no point has a latency and an error above 0",
    )


def curve(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    """A picture a metric, over all facets."""
    assert config.x is not None
    given, made = scatter.lines(found, config.x, config.series), []
    for metric in config.metrics:
        kept = [(text, [p for p in points if p[1].metric(metric) is not None]) for text, points in given]
        kept = [(text, points) for text, points in kept if points]
        what = f"{title(metric)} along {config.x}"
        if kept:
            caption = "Whiskers: 95 % confidence interval, where there is one."
            made.append(Plot(what, caption, partial(scatter.curve, metric=metric, name=config.x, found=kept)))
    lacking = f"nothing to draw: no point has a latency and a number as {config.x}"
    return made or [Plot(f"Along {config.x}", "", reason=lacking)]


MOST_ROWS = 4
"""In one roofline; more are not told apart."""


def roofline(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    made, reasons = [], []
    for facet in found:
        rows = sorted((row for row in facet.ok if row.ranked), key=lambda row: row.p50)[:MOST_ROWS]
        drawn = []
        for row in rows:
            try:
                if (roofs := ceilings(row)) is not None:
                    work = subject.subject(row.record["experiment"]).work()
                    drawn.append((row.label, work, roofs, dict(row.record["metrics"])))
            except UserError as error:
                reasons.append(f"{row.label}: {error}")
        if drawn:
            what = " · ".join(filter(None, ["Roofline", facet.title]))
            caption = (
                "What this GPU was measured to allow, and what the call and its stages reach of it; work is the least "
                f"that the workload needs. The {len(drawn)} fastest."
            )
            made.append(Plot(what, caption, partial(scatter.roofline, found=drawn)))
    if not made:
        reasons = reasons or ["no point has a latency and ceilings of its GPU"]
        made.append(Plot("Roofline", "", reason=f"nothing to draw: {'; '.join(dict.fromkeys(reasons))}"))
    return made


def ceilings(row: Row) -> Rooflines | None:
    """What its GPU was measured to reach in the same run; None for a run on a CPU."""
    burst = _rates(row, "")
    return None if burst is None else Rooflines(burst, _rates(row, "_sustained") or burst)


def _rates(row: Row, suffix: str) -> Ceilings | None:
    copied = row.metric(f"ceilings/copy{suffix}_tb_per_s")
    matrix = row.metric(f"ceilings/matrix{suffix}_tflop_per_s")
    return None if copied is None or matrix is None else Ceilings(1e12 * copied, 1e12 * matrix)


PLOTS: dict[str, Callable[[ReportConfig, Sequence[Facet]], list[Plot]]] = {
    "waterfall": waterfall,
    "kernels": kernels,
    "power": power,
    "roofline": roofline,
    "curve": curve,
    "pareto": pareto,
    "bars": latency_bars,
}


def plots(config: ReportConfig, found: Sequence[Facet]) -> list[Plot]:
    """Of several with one caption only the last keeps it."""
    made = [one for name in config.plots for one in PLOTS[name](config, found)]
    last = [i + 1 == len(made) or made[i + 1].caption != one.caption for i, one in enumerate(made)]
    return [one if kept else replace(one, caption="") for one, kept in zip(made, last, strict=True)]
