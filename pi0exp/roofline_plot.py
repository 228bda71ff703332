"""The roofline of a run as an SVG: what the machine allows at each intensity, and where the stages of the call stand.

Roofline: Williams, Waterman and Patterson 2009. Intensity and work are those of the least work of the workload, so a
point below the roof shows time lost to anything at all: more work, lower rates, gaps. The percentages are shares of the
burst floor. That of the call adds up the floors of its stages; the roof above its point is that of its mean intensity,
which no stage has, so the point lies lower than the percentage says.
"""

import io

import numpy as np

from pi0exp.roofline import Ceilings, Rooflines, floor_ms
from pi0exp.subject import StageWork


def roofline_svg(work: list[StageWork], roofs: Rooflines, timed: dict[str, float]) -> str:
    """Log-log, FLOP per byte against TFLOP/s. A point for the whole call and for each stage with a stage_ms/NAME."""
    import matplotlib
    from matplotlib.figure import Figure

    points = [(name, *place) for name, place in placed(work, timed).items()]
    floors = floor_ms(work, roofs.burst)
    reached = {name: floors.get(name, sum(floors.values())) / taken_ms(name, timed) for name, _, _ in points}
    intensities = [x for _, x, _ in points]
    ridge = roofs.burst.flops_per_s / roofs.burst.bytes_per_s
    x = np.geomspace(min([ridge, *intensities]) / 4, max([ridge, *intensities]) * 4, 200)
    # Text stays text; ids and metadata depend on nothing but the content.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pi0exp"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, ceilings, style in (("burst", roofs.burst, "-"), ("sustained", roofs.sustained, "--")):
            axes.plot(x, [roof(ceilings, one) / 1e12 for one in x], style, color="black", linewidth=1, label=name)
        for name, intensity, rate in points:
            axes.plot([intensity], [rate / 1e12], "o", color="tab:blue", gid=f"stage-{name}")
            note = f"{name} {100 * reached[name]:.0f} %"
            axes.annotate(note, (intensity, rate / 1e12), textcoords="offset points", xytext=(6, -10))
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda rate, _: f"{rate:g}" if f"{rate:e}"[0] in "25" else "")
        axes.legend(title="ceilings", loc="lower right")
        axes.grid(True, linewidth=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def roof(ceilings: Ceilings, intensity: float) -> float:
    """FLOP per second that can be reached at so many FLOP per byte."""
    return min(ceilings.flops_per_s, intensity * ceilings.bytes_per_s)


def taken_ms(name: str, timed: dict[str, float]) -> float:
    """Of a stage, or of the `call`; 0 where it was not timed."""
    return timed["latency_ms/p50"] if name == "call" else timed.get(f"stage_ms/{name}", 0.0)


def placed(work: list[StageWork], timed: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Stage -> (FLOP per byte, FLOP per second reached); `call` is all of them in the median latency."""
    stages = {stage.name: [stage] for stage in work} | {"call": work}
    found = {}
    for name, parts in stages.items():
        flops = sum(part.flops * part.count for part in parts)
        moved = sum(part.bytes_moved * part.count for part in parts)
        if flops and moved and (taken := taken_ms(name, timed)):
            found[name] = (flops / moved, 1e3 * flops / taken)
    return found
