"""The plots: what they draw of made-up records, what they leave out, and that nothing is empty or hidden."""

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
import report_fakes as fakes

from pi0exp.kernel_table import CATEGORIES
from pi0exp.report import axes, bars, document, files, page, scatter, sources
from pi0exp.report.plots import PLOTS, plots
from pi0exp.report.rows import facets
from pi0exp.report.study import Study
from pi0exp.report.svg import DARK, HUES, LIGHT, NARROW, SMALL, WIDE, Canvas, fitted
from pi0exp.result import Outcome

SVG = "{http://www.w3.org/2000/svg}"
PLANNED = tuple(
    {"workload": load, "stack": name} for load in ("default", "masked") for name in [*fakes.RUNGS, "fork_best"]
)


def ladder(*names, **settings):
    config = fakes.configured(label=["stack"], plots=list(names), **settings)
    return Study("ladder", "What does each step add?", ("again",), config, PLANNED)


def drawn(name, records=None, **settings):
    one = ladder(name, **settings)
    return plots(one.report, facets(one, fakes.ladder() if records is None else records))


def parsed(plot, width=WIDE):
    return ElementTree.fromstring(plot.svg(width, alone=True))


def texts(picture):
    return [one.text for one in picture.iter(f"{SVG}text")]


def marks(picture):
    return [one for one in picture.iter() if one.get("class") == "mark"]


def about(picture, name):
    """Marks whose tip begins with this name."""
    return [one for one in marks(picture) if (one.findtext(f"{SVG}title") or "").startswith(f"{name}:")]


def batches(**settings):
    given = {"label": ["stack"], "x": "workload.batch_size", "series": ["stack"], "plots": ["curve"]}
    one = Study("batch_scaling", report=fakes.configured(**given | settings))
    return plots(one.report, facets(one, fakes.batches()))


# ---- what all have in common


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", sorted(set(PLOTS) - {"curve"}))
def test_every_plot_is_a_picture_with_marks_within_its_frame(name, width):
    found = drawn(name)
    assert [plot.title.rpartition(" · ")[2] for plot in found] == ["pi0, default", "pi0, masked"]
    for plot in found:
        picture = parsed(plot, width)
        assert len(marks(picture)) >= 5
        assert float(picture.get("width")) == width
        for one in picture.iter(f"{SVG}text"):
            assert float(one.get("font-size")) >= SMALL
            assert 0 <= float(one.get("x")) <= width
            assert 0 <= float(one.get("y")) <= float(picture.get("height"))
        for one in picture.iter(f"{SVG}rect"):
            x = float(one.get("x", 0))
            assert 0 <= x <= x + float(one.get("width")) <= width


@pytest.mark.parametrize("name", sorted(PLOTS))
def test_without_a_latency_there_is_a_reason_and_no_picture(name):
    records = [fakes.failed("ladder", ("stack=2_sdpa",), Outcome.OOM, "out of memory")]
    for plot in drawn(name, records, x="workload.batch_size"):
        assert plot.draw is None
        assert plot.reason.startswith("nothing to draw: no")


@pytest.mark.parametrize(("name", "lacking"), [("kernels", "profile"), ("power", "power"), ("roofline", "ceilings")])
def test_what_was_not_measured_is_not_drawn(name, lacking):
    records = [fakes.made("ladder", (f"stack={stack}",), 20.0) for stack in ("2_sdpa", "8_compiled")]
    [plot] = drawn(name, records)
    assert plot.draw is None
    assert lacking in plot.reason


def test_colours_can_be_told_from_both_grounds():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (LIGHT, DARK):
        named = dict(re.findall(r"--(\w+):(#\w{6});", HUES + theme))
        assert contrast(named["ink"], named["paper"]) >= 7
        assert contrast(named["muted"], named["paper"]) >= 4.5
        assert contrast(named["link"], named["paper"]) >= 4.5
        for hue in ("c0", "c1", "c2", "c7"):  # of bars and lines; the others stand beside each other in stacks
            assert contrast(named[hue], named["paper"]) >= 3, (hue, theme)
        assert len({named[f"c{i}"] for i in range(8)}) == 8


# ---- each


def test_waterfall_steps_join_and_failures_are_named():
    default, masked = (parsed(plot) for plot in drawn("waterfall"))
    words = texts(default)
    assert "−4.00 → 36.00" in words
    assert "+0.10 → 36.10" in words
    assert "17.00 ms, 9.41 x" in words
    edges = {}
    for name in fakes.RUNGS:
        one = about(default, name)[0]
        x = float(one.get("x"))
        edges[name] = (x, x + float(one.get("width")))
    assert edges["2_sdpa"][1] == pytest.approx(edges["1_graphs"][0], abs=0.2)
    assert edges["6_prefix"][1] == pytest.approx(edges["5_cameras"][0], abs=0.2)
    assert about(default, "3_skip")[0].get("fill") == "var(--c1)"
    assert about(default, "2_sdpa")[0].get("fill") == "var(--c2)"
    assert any(word.startswith("oom: the device ran out") for word in texts(masked))
    # 6_prefix steps on from the last rung that was measured, not from the one that failed.
    assert "−4.25 → 21.25" in texts(masked)


@pytest.mark.parametrize("name", ["waterfall", "bars"])
def test_what_computes_other_actions_is_hollow_and_marked(name):
    masked = parsed(drawn(name)[1])
    assert "≈ fork_best" in texts(masked)
    assert about(masked, "fork_best")[0].get("fill") == "none"
    assert about(masked, "8_compiled")[0].get("fill") != "none"


def test_bars_have_whiskers_at_their_intervals():
    one = ladder("bars")
    facet = facets(
        one, [fakes.made("ladder", (f"stack={n}",), p, calls=40) for n, p in (("2_sdpa", 30.0), ("3_skip", 20.0))]
    )
    canvas = Canvas(WIDE)
    bars.bars(canvas, facet[0], lambda row: "red", [])
    whiskers = [part for part in canvas.parts if 'stroke-width="1.4"' in part]
    assert len(whiskers) == 2 * 3
    [bar] = [part for part in canvas.parts if "3_skip: " in part]
    x, width = (float(re.search(rf' {name}="([\d.]+)"', bar)[1]) for name in ("x", "width"))
    ends = sorted({float(re.search(r'x1="([\d.]+)"', part)[1]) for part in whiskers[3:]})
    assert ends[0] <= x + width <= ends[-1]
    assert ends[-1] - ends[0] > 0


def test_one_value_far_beyond_the_others_is_cut_and_keeps_its_number():
    default = parsed(drawn("bars")[0])
    eager = about(default, "0_eager")[0]
    graphs = about(default, "1_graphs")[0]
    assert float(eager.get("width")) < 1.4 * float(graphs.get("width"))
    assert "160.00" in texts(default)
    assert sum(line.get("stroke-width") == "2.5" for line in default.iter(f"{SVG}line")) == 2
    assert bars.reach([10.0, 11.0, 12.0]).high == pytest.approx(12.24)
    assert bars.reach([10.0, 100.0]).high == pytest.approx(102.0), "of two, neither is the odd one"


def test_kernels_are_stacked_in_the_shares_of_their_time():
    default = parsed(drawn("kernels")[0])
    parts = about(default, "8_compiled")
    assert len(parts) == len(CATEGORIES)
    widths = {one.findtext(f"{SVG}title").split()[1]: float(one.get("width")) for one in parts}
    assert widths["gemm"] / widths["attention"] == pytest.approx(5.5, rel=0.05)
    edges = [(float(one.get("x")), float(one.get("x")) + float(one.get("width"))) for one in parts]
    assert all(end == pytest.approx(start, abs=0.2) for (_, end), (start, _) in pairwise(edges))
    assert len({one.get("fill") for one in parts}) == len(CATEGORIES)


def test_power_has_the_line_of_equal_energy_through_the_baseline():
    plot = drawn("power")[0]
    picture = parsed(plot)
    assert any("as many joules a call as 0_eager" in word for word in texts(picture))
    line = picture.find(f"{SVG}polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    dot = about(picture, "0_eager")[0]
    x, y = float(dot.get("cx")), float(dot.get("cy"))
    assert min((px - x) ** 2 + (py - y) ** 2 for px, py in points) < 9
    other = about(picture, "8_compiled")[0]
    assert min((px - float(other.get("cx"))) ** 2 for px, py in points) > 100, "far below the line"


def test_pareto_front_is_of_what_computes_the_same():
    records = [
        fakes.made("toy", ("stack=fork_best",), 5.0, error=0.4, numerics="APPROXIMATE"),
        fakes.made("toy", ("stack=8_compiled",), 10.0, error=0.006),
        fakes.made("toy", ("stack=7_hoists",), 20.0, error=0.004),
        fakes.made("toy", ("stack=6_prefix",), 30.0, error=0.005),
    ]
    [facet] = facets(ladder("pareto"), records)
    assert [row.label for row in scatter.front(facet.rows)] == ["8_compiled", "7_hoists"]


def test_roofline_points_are_those_of_the_fastest():
    default = parsed(drawn("roofline")[0])
    tips = {one.findtext(f"{SVG}title").partition(":")[0] for one in marks(default)}
    assert {f"8_compiled, {stage}" for stage in ("call", "vision", "prefill", "denoise")} <= tips
    assert not any(tip.startswith("0_eager") for tip in tips)
    assert {"call", "denoise"} <= set(texts(default))
    assert len(list(default.iter(f"{SVG}polyline"))) == 2, "burst and sustained"


def test_curve_has_a_line_a_series_and_a_picture_a_metric():
    found = batches(metrics=["latency_ms/p50", "throughput_hz", "energy_j/call"])
    assert [plot.title.partition(" along ")[0] for plot in found] == ["p50", "samples/s", "J a call"]
    for plot in found:
        picture = parsed(plot)
        assert len(list(picture.iter(f"{SVG}polyline"))) == 2
        assert {"2_sdpa", "8_compiled"} <= set(texts(picture))
        assert len(list(picture.iter(f"{SVG}circle"))) == 14


def test_curve_of_facets_has_a_line_each():
    found = batches(facet=["stack"], label=["workload.batch_size"], series=[], metrics=["latency_ms/p50"])
    assert len(list(parsed(found[0]).iter(f"{SVG}polyline"))) == 2


# ---- axes and names


def test_ticks_stand_within_their_axis():
    assert axes.Axis(0, 50).ticks(5) == [0, 10, 20, 30, 40, 50]
    assert axes.Axis(8, 900, log=True).ticks(6) == [10, 30, 100, 300]
    for one in (axes.axis([3.0, 3.0]), axes.axis([0.005, 0.0051], log=True), axes.axis([0.0], zero=True)):
        assert one.low < one.high
        assert len(one.ticks(6)) >= 1


def test_names_cover_neither_each_other_nor_points():
    canvas = Canvas(WIDE)
    frame = axes.Frame(canvas, axes.Axis(0, 10), axes.Axis(0, 10))
    frame.draw("x", "y")
    points = [(frame.x(5 + i / 10), frame.y(5 + i / 20), f"stack number {i}") for i in range(6)]
    frame.name(points)
    assert not any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(frame.taken[6:], 2)
    )
    assert sum("stack number" in part for part in canvas.parts) == 6


def test_names_without_room_become_numbers_with_a_key():
    canvas = Canvas(NARROW)
    frame = axes.Frame(canvas, axes.Axis(0, 10), axes.Axis(0, 10))
    frame.draw("x", "y")
    before = canvas.height
    frame.name([(frame.x(5), frame.y(5), "a long name of a stack")])
    assert ">1</text>" in "".join(canvas.parts)
    assert ">1  a long name of a stack</text>" in "".join(canvas.parts)
    assert canvas.height > before


def test_fitted():
    assert fitted("short", 100) == "short"
    assert fitted("a text that is far too long for it", 60).endswith("…")


# ---- where they stand


def test_picture_of_the_readme_stands_alone():
    chapter = document.chapter(ladder("waterfall"), sources.sorted_out(fakes.ladder()), [])
    picture = files.picture(chapter)
    ElementTree.fromstring(picture)
    assert "prefers-color-scheme:dark" in picture
    assert picture.count("What each step brings") == 3, "a title, and a heading each"
    assert "NVIDIA H200" in picture
    assert files.picture(document.chapter(ladder("waterfall"), {}, [])) is None


def test_page_says_what_is_missing_and_needs_nothing_else():
    measured = sources.sorted_out([*fakes.ladder(), *fakes.batches()])
    one = ladder("waterfall", "kernels", "power", "roofline", "pareto", "bars", answer="ladder")
    made = page.page([document.chapter(one, measured, []), document.chapter(Study("masking", "Why?"), measured, [])])
    assert "Not measured yet" in made
    assert '<section id="masking"' not in made
    assert not re.search(r"(src|href)=\"(?!#)", made)
    assert "<script" not in made
    assert "url(" not in made
    assert "@import" not in made
    assert made.count('class="wide"') == made.count('class="narrow"') == 12
    assert "oom: the device ran out of memory" in made


def test_text_of_records_cannot_become_markup():
    record = fakes.failed("toy", (), Outcome.ERROR, "<script>alert(1)</script> & more")
    made = page.page([document.chapter(Study("toy", "<b>?"), sources.sorted_out([record]), [])])
    assert "<script" not in made
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in made
