"""Published figures: the file of the repository, mistakes in one, and what becomes of a figure."""

import pytest
import report_fakes as fakes

from pi0exp.errors import UserError
from pi0exp.report import document, page, published, sources, text
from pi0exp.report.published import Figure, Ours, Pick, State
from pi0exp.report.rows import Row
from pi0exp.report.study import Study

H200, MI350 = "NVIDIA H200", "AMD Instinct MI350X"


def rows(*records):
    return [Row((record["params"].get("stack", "-"),), record) for record in records]


def figure(value, **changes):
    given = {"id": "a", "study": "ladder", "what": "latency", "unit": "ms", "gpu": "H200", "source": "somebody"}
    return Figure(**given | {"value": value, "ours": Ours({"stack": "2_sdpa"})} | changes)


def judged(one, *records, gpu=H200):
    return published.judged(one, {gpu: rows(*records)})


def test_every_variant_of_the_published_figures_stands_in_the_file():
    found = published.figures()
    values = {(one.study, one.value, one.high) for one in found}
    ladder = [32.9, 25.35, 35.7, 24.8, 26, 21.2, 22.2]
    assert {("ladder", value, None) for value in ladder} | {("ladder", 24.8, 25.0)} <= values
    assert {("ladder_layers", value, None) for value in (3.54, 3.38, 2.71, 2.61, 2.76)} <= values
    assert {("graph_granularity", value, None) for value in (2.93, 1.96, 1.0, 0.73)} <= values
    assert {("breakdown", value, None) for value in (79, 8, 3, 10)} <= values
    others = {
        ("graph_capture", 10, 15),
        ("compile_modes", 65, None),
        ("kernels", 4.0, None),
        ("kernels", 2.5, None),
        ("gemm_efficiency", 90, None),
        ("gemm_efficiency", 1.57, None),
        ("attention_backends", 1.05, None),
        ("masking", 21.2, None),
        ("masking", 24.8, None),
        ("batch_scaling", 97.6, None),
        ("perf_per_watt", 23, None),
    }
    assert others <= values
    assert all(one.source for one in found)


def test_variants_name_each_other():
    found = {one.id: one for one in published.figures()}
    for one in found.values():
        for other in one.conflicts:
            assert one.id in found[other].conflicts or found[other].study != one.study, (one.id, other)


def test_reproduced_within_its_tolerance():
    record = fakes.made("ladder", ("stack=2_sdpa",), 34.0)
    one = judged(figure(32.9, tolerance=0.05), record)
    assert (one.state, one.told, one.ours_text) == (State.reproduced, "reproduced (within 5 %)", "34 ms")
    assert judged(figure(32.9, tolerance=0.03), record).state is State.differs


def test_difference_is_told_with_its_reason_from_the_nearer_end_of_a_range():
    record = fakes.made("ladder", ("stack=2_sdpa",), 30.0)
    assert judged(figure(24.0, high=25.0, why="another workload"), record).told == "differs by +20 %: another workload"
    assert judged(figure(40.0, high=50.0), record).told == "differs by -25 %"
    assert judged(figure(29.0, high=31.0), record).state is State.reproduced


def test_amd_figures_are_not_run_here_and_ours_stands_beside_them():
    record = fakes.made("ladder", ("stack=2_sdpa",), 30.0)
    one = judged(figure(24.8, gpu="MI350"), record)
    assert (one.state, one.told, one.ours_text, one.gpu) == (State.not_run, "not run here (AMD)", "30 ms", H200)
    assert judged(figure(24.8, gpu="MI350")).told == "not run here (AMD)"
    there = fakes.made("ladder", ("stack=2_sdpa",), 24.9, prints=fakes.MI350)
    assert judged(figure(24.8, gpu="MI350"), there, gpu=MI350).state is State.reproduced


def test_our_gpu_of_the_same_kind_wins():
    ours, other = fakes.made("ladder", ("stack=2_sdpa",), 33.0), fakes.made("ladder", ("stack=2_sdpa",), 24.8)
    one = published.judged(figure(32.9), {MI350: rows(other), H200: rows(ours)})
    assert (one.state, one.gpu) == (State.reproduced, H200)


def test_nothing_measured_and_several_that_fit():
    assert judged(figure(32.9)).state is State.not_measured
    two = [fakes.made("ladder", ("stack=2_sdpa", f"workload={load}"), 30.0) for load in ("default", "masked")]
    assert judged(figure(32.9), *two).told == "unclear: 2 rows have stack=2_sdpa"
    assert judged(figure(32.9, ours=None, why="nobody knows"), *two).told == "not run here (on an H200): nobody knows"


def test_the_best_is_picked_of_what_computes_the_same():
    records = [
        fakes.made("ladder", ("stack=fork_best",), 10.0, numerics="APPROXIMATE"),
        fakes.made("ladder", ("stack=2_sdpa",), 30.0),
        fakes.made("ladder", ("stack=8_compiled",), 17.0),
    ]
    assert judged(figure(17.0, ours=Ours(pick=Pick.least)), *records).ours == 17.0
    assert judged(figure(17.0, ours=Ours(pick=Pick.most)), *records).ours == 30.0
    assert judged(figure(17.0, ours=Ours(pick=Pick.least, approximate=True)), *records).ours == 10.0


def test_another_model_and_a_cpu_never_stand_for_ours():
    tiny = fakes.made("ladder", ("stack=2_sdpa", "model=tiny"), 33.0)
    assert judged(figure(32.9), tiny).ours is None
    on_cpu = fakes.made("ladder", ("stack=2_sdpa",), 33.0, prints=fakes.H200 | {"gpu": "CPU"})
    there = {"CPU": rows(on_cpu)}
    assert published.judged(figure(24.8, gpu="MI350"), there).ours is None
    assert judged(figure(32.9), tiny, fakes.made("ladder", ("stack=2_sdpa",), 34.0)).ours == 34.0


def test_other_dimensions_stand_for_ours_only_where_they_are_asked_for():
    depth = {"model.vision.depth": "2"}
    small = fakes.made("ladder", ("stack=2_sdpa", "model.vision.depth=2"), 33.0)
    whole = fakes.made("ladder", ("stack=2_sdpa",), 34.0)
    assert judged(figure(32.9), small).state is State.not_measured
    assert judged(figure(32.9), small, whole).ours == 34.0
    assert judged(figure(32.9, ours=Ours({"stack": "2_sdpa"} | depth)), small, whole).ours == 33.0


def test_ratios_shares_and_microseconds():
    fast = fakes.made("ladder", ("stack=8_compiled",), 10.0, metrics=fakes.rich(10.0))
    slow = fakes.made("ladder", ("stack=2_sdpa",), 40.0)
    ratio = figure(4.0, unit="x", ours=Ours({"stack": "8_compiled"}), over=Ours({"stack": "2_sdpa"}))
    assert judged(ratio, fast, slow).ours == 4.0
    assert judged(ratio, fast).ours is None
    share = figure(55, unit="%", ours=Ours({"stack": "8_compiled"}, "kernels_share/gemm"))
    assert judged(share, fast).ours_text == "55 %"
    assert judged(figure(10_000, unit="us", ours=Ours({"stack": "8_compiled"})), fast).ours == 10_000


ENTRY = "{id: a, study: ladder, what: w, value: 3, unit: ms, gpu: H200, source: s"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"figures:\n- {ENTRY}, colour: red}}", "a.colour: Key 'colour' not in 'Figure'"),
        (f"figures:\n- {ENTRY.replace('ms', 'hours')}}}", "a.unit is 'hours'; choose one of ms, us"),
        (f"figures:\n- {ENTRY.replace('H200', 'Z80')}}}", "a.gpu is 'Z80'; choose one of MI300X"),
        (f"figures:\n- {ENTRY.replace('value: 3', 'value: three')}}}", "a.value: Value 'three' of type 'str'"),
        (f"figures:\n- {ENTRY}, high: 2}}", "a.value 3.0, high 2.0; value must be above 0"),
        (f"figures:\n- {ENTRY}, tolerance: 5}}", "a.tolerance is 5.0; it must be a share"),
        (f"figures:\n- {ENTRY}, over: {{}}}}", "a.over is set without ours"),
        (f"figures:\n- {ENTRY}, ours: {{pick: any}}}}", "a.ours.pick: Invalid value 'any'"),
        (f"figures:\n- {ENTRY}, conflicts: [b]}}", "a: conflicts names b, which is no id"),
        (f"figures:\n- {ENTRY}}}\n- {ENTRY}}}", "a: the id stands there twice"),
        ("figures:\n- {id: a}", "missing mandatory value"),
        ("figures: [3]", "number 1: is 3; it must hold settings"),
        ("figure: []", "must hold a list `figures`"),
        ("figures: [", "while parsing"),
    ],
)
def test_mistakes_are_told_on_one_line_with_the_file(tmp_path, content, told):
    file = tmp_path / "published.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        published.figures(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_forms_of_the_report_show_published_beside_ours():
    records = sources.sorted_out([fakes.made("ladder", ("stack=2_sdpa",), 33.0)])
    figures = [figure(32.9), figure(24.8, id="b", gpu="MI350", assumed=True, conflicts=["a"])]
    chapter = document.chapter(Study("ladder", "Why?"), records, figures)
    for shown in (text.printed([chapter]), page.page([chapter])):
        for word in (
            "32.9 ms",
            "33 ms",
            "reproduced (within 5 %)",
            "not run here (AMD)",
            "MI350 (assumed)",
            "somebody",
        ):
            assert word in shown
