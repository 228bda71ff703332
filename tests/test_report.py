"""The report's tables, answers and order, from made-up records and from the committed ones."""

import json
import re
from dataclasses import replace

import pytest
import report_fakes as fakes

from pi0exp import compose
from pi0exp.config import Answer, ReportConfig
from pi0exp.errors import UserError
from pi0exp.experiments.tables import answers
from pi0exp.known import RESULTS
from pi0exp.load import write_record
from pi0exp.report import __main__ as command
from pi0exp.report import files, published, sources, study, text
from pi0exp.report.answers import ANSWERS, answer
from pi0exp.report.cells import number
from pi0exp.report.chapters import chapters
from pi0exp.report.rows import facets, latest, missing
from pi0exp.report.study import Study
from pi0exp.result import Outcome
from pi0exp.track import Store

LADDER = Study(
    "ladder",
    "What does each step add?",
    ("python -m pi0exp study=ladder",),
    fakes.configured(label=["stack"], metrics=["latency_ms/p50", "energy_j/call", "error/rel_l2"], answer="ladder"),
    tuple({"workload": load, "stack": name} for load in ("default", "masked") for name in [*fakes.RUNGS, "fork_best"]),
)


def rows_of(table):
    return {
        cells[0].strip("`"): dict(zip([c.title for c in table.columns], cells, strict=True)) for cells in table.rows
    }


# ---- rows


def test_rows_stand_in_the_order_of_the_sweep_and_facets_apart():
    found = facets(LADDER, fakes.ladder())
    assert [facet.title for facet in found] == ["pi0, default", "pi0, masked"]
    assert [row.label for row in found[0].rows] == list(fakes.RUNGS)
    assert [row.label for row in found[1].rows] == [*fakes.RUNGS, "fork_best"]


def test_what_is_missing_is_said():
    whole = [*fakes.ladder(), fakes.made("ladder", ("stack=fork_best", "workload=default"), 9.0)]
    (complete,) = fakes.chaptered(LADDER, whole).machines
    assert "Not measured" not in complete.answer
    (torn,) = fakes.chaptered(LADDER, [one for one in whole if one["params"]["workload"] == "default"]).machines
    count, first = len(fakes.RUNGS) + 1, next(iter(fakes.RUNGS))
    assert f"Not measured: {count} of {2 * count} points (`workload=masked stack={first}`, " in torn.answer


def test_by_latency_the_slowest_comes_first():
    by_latency = replace(LADDER, report=replace(LADDER.report, order="latency"))
    labels = [row.label for row in facets(by_latency, fakes.ladder())[0].rows]
    assert labels.index("3_skip") < labels.index("2_sdpa")


def test_points_of_a_list_are_in_its_order():
    lines = [
        "stack=8_compiled",
        "stack=8_compiled attention=eager",
        "stack=8_compiled fusion.rewrites.rope_tables=false",
    ]
    records = [fakes.made("ablation", tuple(line.split()), 10.0 + i) for i, line in enumerate(lines)]
    one = Study("ablation", planned=study.planned({"points": lines}))
    labels = [row.label for row in facets(one, records)[0].rows]
    assert labels == ["8_compiled", "8_compiled attention=eager", "8_compiled -rope_tables"]
    assert study.planned({"params": {"a": "1,2", "b": "x"}}) == ({"a": "1", "b": "x"}, {"a": "2", "b": "x"})


BASE = ("stack=h200_best", "workload=masked", "workload.prompt_padded=48")
"""What `study=ablation` is without its points."""


def ablation(*words, ms):
    return fakes.made("ablation", (*BASE, *words), ms)


def test_a_point_is_the_planned_one_that_says_most_of_it():
    """Whatever is as it was fits the point that changes nothing, too; of several, the whole group was meant."""
    one = study.study("ablation")
    base, graphs = ablation(ms=14.0), ablation("graphs=none", ms=160.0)
    fused = ablation("fusion=projections", ms=24.0)
    qkv = ablation("fusion.qkv=false", "fusion.rope=false", ms=21.0)
    left = missing(one, [base, graphs, fused, qkv])
    assert len(left) == len(one.planned) - 4
    assert not {"workload.seed=0", "graphs=none", "fusion=projections", "fusion.qkv=False fusion.rope=False"} & {*left}
    assert {"workload.seed=1", "fusion.norms=False", "fusion.rope=False"} <= {*left}


def test_a_smaller_model_is_no_planned_point():
    left = missing(study.study("ablation"), [ablation("graphs=none", "model.vision.depth=2", ms=20.0)])
    assert "graphs=none" in left


def test_a_point_of_a_stack_is_none_of_those_that_set_its_options():
    one = study.study("fidelity")
    words = (("attention=eager",), ("precision=fp8",), ("stack=h200_best",), ("stack=7_hoists",))
    left = missing(one, [fakes.made("fidelity", line, 20.0) for line in words])
    assert not {line for (line,) in words} & {*left}
    assert len(left) == len(one.planned) - len(words)
    assert {"attention=triton", "graphs=manual", "stack=fork_best"} <= {*left}


def test_a_setting_as_in_its_file_is_not_that_of_another_point():
    one = study.study("attention_backends")
    automatic = fakes.made("attention_backends", ("stack=7_hoists", "attention=sdpa"), 27.0)
    left = missing(one, [automatic])
    assert "attention=sdpa" not in left
    assert "attention=sdpa attention.backend=flash" in left
    eager = fakes.made("attention_backends", ("stack=7_hoists", "attention=eager"), 33.0)
    assert [row.names for row in facets(one, [automatic, eager])[0].rows] == [("eager", "-"), ("sdpa", "auto")]
    assert [row.label for row in facets(one, [automatic, eager])[0].rows] == ["eager", "sdpa auto"]


def test_parts_are_told_by_what_their_absence_costs():
    one = study.study("ablation")
    seeds = [ablation(f"workload.seed={seed}", ms=ms) for seed, ms in enumerate((14.0, 14.1, 13.9))]
    records = [*seeds, ablation("graphs=none", ms=160.0), ablation("fusion.rewrites.rope_tables=false", ms=14.05)]
    found = facets(one, records)
    assert [row.p50 for row in found[0].rows][:3] == [14.0, 14.1, 13.9]
    told = answer(one.report, found)
    assert told.startswith("The whole stack takes 13.90 to 14.10 ms on 3 sets of observations")
    assert "`h200_best graphs=none` +146.00 ms; 0 more cost something, 1 nothing that shows" in told
    assert "whole stack" not in answer(one.report, facets(one, [seeds[0], records[3]]))  # noise is not known


def test_a_switch_that_an_older_record_does_not_have_is_off():
    old, new = (fakes.made("toy", ("stack=2_sdpa",), ms, prints=fakes.at(t)) for ms, t in ((11.0, "08"), (10.0, "09")))
    old = json.loads(json.dumps(old))
    del old["experiment"]["fusion"]["qkv"]
    [row] = facets(Study("toy"), [old, new])[0].rows
    assert row.p50 == 10.0
    other = json.loads(json.dumps(new))
    other["experiment"]["fusion"]["qkv"] = True
    assert len(facets(Study("toy"), [old, new, other])[0].rows) == 2


def test_quick_ones_are_counted_among_those_that_measured():
    records = [
        fakes.made("toy", ("stack=2_sdpa", "measure=quick"), 10.0),
        fakes.failed("toy", (), Outcome.UNSUPPORTED, "needs a GPU"),
    ]
    assert "1 of 1 in the quick form only" in answer(ReportConfig(), facets(Study("toy"), records))


def test_without_an_interval_times_must_not_overlap():
    """Of few calls that hang together the median's interval is not known."""

    def row(stack, low, p50, high):
        spread = {"latency_ms/p10": low, "latency_ms/p90": high}
        record = fakes.made("toy", (f"stack={stack}",), p50, metrics=spread, calls=2)
        record["metrics"] = {k: v for k, v in record["metrics"].items() if "p50_" not in k} | spread
        return record

    fast, near, far = (
        row("8_compiled", 9.0, 10.0, 12.0),
        row("2_sdpa", 11.0, 11.5, 13.0),
        row("0_eager", 14.0, 15.0, 16.0),
    )
    one = Study("toy", report=fakes.configured(label=["stack"]))
    assert facets(one, [fast])[0].rows[0].interval is None
    assert "no difference seen between them, of 2" in answer(one.report, facets(one, [fast, near]))
    assert "`8_compiled` is the fastest of 2" in answer(one.report, facets(one, [fast, far]))


def test_masks_are_told_by_time_and_by_actions():
    one = study.study("masking")
    words = ("stack=h200_best", "workload.cameras_present=[true,true,false]")
    keep, skip = (
        fakes.made("masking", (*words, f"image_masking={name}"), ms) for name, ms in (("keep", 16), ("skip", 14))
    )
    ignore = fakes.made("masking", (*words, "image_masking=ignore"), 15.0, error=0.09, numerics="APPROXIMATE")
    told = answer(one.report, facets(one, [keep, skip, ignore]))
    assert "`skip` is the fastest of 2 with 14.00 ms, 1.14 times as fast as `keep`" in told
    assert "`ignore` takes 15.00 ms and computes other actions, 9.0e-02 away" in told


def test_of_one_point_the_latest_counts_and_a_quick_one_only_alone():
    old = fakes.made("toy", ("stack=2_sdpa",), 30.0)
    new = fakes.made("toy", ("stack=2_sdpa",), 20.0, prints=fakes.H200 | {"date": "2026-01-03"})
    quick = fakes.made("toy", ("stack=2_sdpa", "measure=quick"), 10.0, prints=fakes.H200 | {"date": "2026-01-04"})
    assert latest([new, old, quick]) == [new]
    assert latest([quick]) == [quick]


def test_equal_labels_are_told_apart():
    records = [fakes.made("toy", ("stack=2_sdpa", f"workload.horizon={n}"), 10.0 + n) for n in (10, 50)]
    one = Study("toy", report=fakes.configured(label=["stack"], facet=[]))
    labels = [row.label for row in facets(one, records)[0].rows]
    assert sorted(labels) == ["2_sdpa workload.horizon=10", "2_sdpa workload.horizon=50"]


def test_what_is_swept_does_not_split_the_workload():
    one = Study("batch_scaling", report=fakes.configured(label=["stack", "workload.batch_size"]))
    [facet] = facets(one, fakes.batches())
    assert facet.title == "pi0, default"
    assert len(facet.rows) == 14


# ---- tables


def test_table_has_intervals_speed_up_and_the_reason_of_what_failed():
    default, masked = fakes.chaptered(LADDER, fakes.ladder()).machines[0].tables
    first = rows_of(default)["0_eager"]
    assert (first["p50 ms"], first["speed-up"], first["numerics"]) == ("160.00", "1", "EXACT")
    assert re.fullmatch(r"159\.\d\d to 160\.\d\d", first["95 %"])
    assert rows_of(default)["8_compiled"]["speed-up"] == "9.41 x"
    assert rows_of(default)["8_compiled"]["J a call"] == number(17.0 * (250 + 2500 / 17) / 1e3)
    failed = rows_of(masked)["5_cameras"]
    assert (failed["p50 ms"], failed["95 %"], failed["speed-up"]) == ("oom", "-", "-")
    assert failed["remarks"] == "oom: the device ran out of memory"
    assert rows_of(masked)["fork_best"]["remarks"] == "other actions: not ranked; clocks held"
    assert "remarks" not in rows_of(default)["0_eager"]


def test_an_older_record_has_an_interval_from_its_samples():
    record = fakes.made("toy", (), 20.0)
    for name in ("p50_low", "p50_high"):
        del record["metrics"][f"latency_ms/{name}"]
    [facet] = facets(Study("toy"), [record])
    low, high = facet.rows[0].interval
    assert 19.8 < low < 20 < high < 20.2


def test_quick_rows_say_so_among_others_and_once_for_all():
    quick = fakes.made("toy", ("stack=2_sdpa", "measure=quick"), 20.0, calls=30)
    [machine] = fakes.chaptered(Study("toy"), [quick, fakes.made("toy", (), 30.0)]).machines
    assert rows_of(machine.tables[0])["2_sdpa"]["remarks"] == "quick form, 30 calls"
    assert "1 of 2 in the quick form only" in machine.answer
    [machine] = fakes.chaptered(Study("toy"), [quick]).machines
    assert [c.title for c in machine.tables[0].columns][-1] != "remarks"
    assert "1 of 1 in the quick form only" in machine.answer


def test_rows_of_several_gpus_of_a_kind_say_which():
    def row(stack, card):
        return fakes.made("toy", (f"stack={stack}",), 20.0, prints=fakes.H200 | ({"gpu_uuid": card} if card else {}))

    failed = fakes.failed("toy", ("stack=5_cameras",), Outcome.OOM, "full")
    made = [row("1_graphs", "GPU-b"), row("2_sdpa", "GPU-a"), row("3_skip", "GPU-b"), row("7_hoists", ""), failed]
    [machine] = fakes.chaptered(Study("toy"), made).machines
    cards = {name: cells["GPU"] for name, cells in rows_of(machine.tables[0]).items()}
    first = cards["1_graphs"]
    assert {first, cards["2_sdpa"]} == {"A", "B"}
    assert cards["3_skip"] == first
    assert (cards["7_hoists"], cards["5_cameras"]) == ("-", "-")
    assert "On 2 GPUs of this kind" in machine.answer
    [machine] = fakes.chaptered(Study("toy"), [row("1_graphs", "GPU-b"), row("3_skip", "GPU-b")]).machines
    assert "GPU" not in rows_of(machine.tables[0])["1_graphs"]
    assert "of this kind" not in machine.answer


def test_times_of_microseconds_are_shown_as_such():
    [machine] = fakes.chaptered(Study("toy"), [fakes.made("toy", (), 0.021)]).machines
    assert rows_of(machine.tables[0])["none: plain PyTorch"]["p50 us"] == "21.00"


def test_parts_of_a_point_have_a_table():
    parts = {
        "case_us/small/op": 2.0,
        "case_us/small/eager": 8.0,
        "case_ratio/small/eager": 4.0,
        "case_share/small": 0.5,
    }
    [machine] = fakes.chaptered(Study("toy"), [fakes.made("toy", (), 1.0, metrics=parts)]).machines
    assert machine.tables[-1].caption == "none: plain PyTorch · part by part"
    assert rows_of(machine.tables[-1]) == {
        "small": {"case": "`small`", "op us": "2", "eager us": "8", "eager takes": "4.00 x", "share": "50 %"}
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "3"), (0.5, "0.5"), (1234.56, "1235"), (12345.6, "12346"), (2e-5, "2.0e-05"), (2.5e9, "2.500e+09")],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_markdown_escapes_what_would_end_a_cell():
    record = fakes.failed("toy", (), Outcome.UNSUPPORTED, "needs a | b\nand more")
    page = text.printed([fakes.chaptered(Study("toy"), [record])])
    assert "unsupported: needs a &#124; b and more |" in page


# ---- answers


def answered(kind, records, **settings):
    config = fakes.configured(answer=kind, **settings)
    return answer(config, facets(Study("toy", report=config, planned=LADDER.planned), records))


def test_every_answer_has_a_sentence():
    assert set(ANSWERS) == set(Answer)


def test_ladder_answer():
    told = answered("ladder", fakes.ladder(), label=["stack"])
    assert told.startswith("pi0, default: from 160.00 ms (`0_eager`) to 17.00 ms (`8_compiled`), 9.41 times as fast; ")
    assert "the largest step is `1_graphs` with 120.00 ms less; pi0, masked: from 136.00 ms" in told
    assert told.endswith("19 measurements: 18 ok, 1 oom.")
    assert "fork_best" not in told


def test_what_computes_other_actions_is_never_the_fastest():
    records = [
        fakes.made("toy", ("stack=fork_best",), 10.0, numerics="APPROXIMATE"),
        fakes.made("toy", ("stack=2_sdpa",), 20.0),
        fakes.made("toy", ("stack=8_compiled",), 15.0),
    ]
    told = answered("fastest", records, label=["stack"])
    assert told == "`8_compiled` is the fastest of 2 with 15.00 ms, 1.33 times as fast as `2_sdpa`."


def test_no_winner_where_no_difference_is_seen():
    records = [fakes.made("toy", (f"stack={name}",), p50) for name, p50 in (("2_sdpa", 15.01), ("8_compiled", 15.0))]
    told = answered("fastest", records, label=["stack"])
    assert told == "`8_compiled` and `2_sdpa` are the fastest, no difference seen between them, of 2 with 15.00 ms."


def test_scaling_answer():
    told = answered("scaling", fakes.batches(), label=["stack"], x="workload.batch_size", series=["stack"])
    assert re.match(
        r"The highest throughput is \d+\.\d samples/s at batch_size 64 \(`8_compiled.*`\), \d\.\d\d times that at 1",
        told,
    )
    records = [fakes.made("toy", (f"workload.num_steps={n}",), 10.0 + n) for n in (1, 10)]
    told = answered("scaling", records, x="workload.num_steps")
    assert told == "From num_steps 1 to 10 p50 goes from 11.00 ms to 20.00 ms, 1.82 times."


def test_parity_answer_names_the_target_of_the_other_gpu():
    records = [fakes.made("toy", (), 32.9, metrics=fakes.rich(32.9, 600))]
    told = answered("parity", records)
    assert "has the most calls a watt: 0.05066 calls/s/W at 32.90 ms and 600 W" in told
    assert "(700 W, 1000 W) AMD Instinct MI350X must take 23.03 ms or less" in told
    assert answered("parity", [fakes.made("toy", (), 32.9)]) == "No power was measured."


def test_fidelity_answer():
    told = answered("fidelity", fakes.ladder()[-4:], label=["stack"])
    assert told == (
        "3 of 4 keep to the bound of plain PyTorch's own error, the largest being 5.0e-03 (`6_prefix`); "
        "1 computes other actions, up to 4.3e-01 away (`fork_best`)."
    )


def test_without_a_latency_only_the_outcomes_are_told():
    records = [fakes.failed("toy", (), Outcome.UNSUPPORTED, "needs a GPU")]
    assert all(answered(kind, records, x="workload.batch_size") == "1 measurement: 1 unsupported." for kind in Answer)
    assert answer(ReportConfig(), []) == ""


# ---- studies


def test_every_study_of_the_repository_has_a_question():
    names = {*compose.files()["study"], *(path.parent.name for path in RESULTS.glob("*/about.yml"))}
    assert {"ladder", "stacks", "covering", "first_light"} <= names
    for name in names:
        one = study.study(name)
        assert one.question.endswith("?"), name
        assert one.commands, name


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("report: {lable: []}", "report.lable: Key 'lable' not in 'ReportConfig'"),
        ("report: {plots: [pie]}", "report.plots: 'pie' is none of waterfall, kernels"),
        ("report: {baseline: last}", "report.baseline is 'last'"),
        ("report: [", "while parsing"),
        ("- a list", "holds no settings"),
    ],
)
def test_mistakes_of_a_study_are_told_with_its_file(tmp_path, content, told):
    file = tmp_path / "toy.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        study.of_yaml("toy", file)
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)


def test_question_ends_at_its_mark(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text("# @package _global_\n# What is\n# asked? And more.\nname: toy\n# Not this?\n")
    assert study.question(file) == "What is asked?"


# ---- sources and files


def test_committed_tables_are_those_of_the_committed_results():
    made = files.written(chapters([], sources.committed))
    tables = {path.resolve() for path in made if path.suffix == ".md"}
    assert tables == {path.resolve() for path in RESULTS.glob("*/*.md")}, "run: python -m pi0exp.report --write"
    for path, content in made.items():
        assert path.read_text() == content, f"{path} is not made of the results; run: python -m pi0exp.report --write"


def test_every_published_figure_is_in_some_chapter():
    shown = [one.figure for chapter in chapters([], lambda names: {}) for one in chapter.figures]
    assert sorted(one.id for one in shown) == sorted(one.id for one in published.figures())


def test_index_and_picture_of_the_readmes(monkeypatch):
    found = [fakes.chaptered(LADDER, fakes.ladder()), fakes.chaptered(Study("masking", "What do masks cost?"), [])]
    monkeypatch.setattr(answers, "_chapters", lambda: [*found, fakes.chaptered(Study("nobody"), [])])
    index = answers.answers("all")
    link = "[NVIDIA H200](results/ladder/nvidia-h200.md)"
    assert re.search(
        rf"\| `ladder` \| What .*\? \| pi0, default: from .* \| 2026-01-02 \| {re.escape(link)} \|\n", index
    )
    assert "| `masking` | What do masks cost? | Not measured yet. | - | - |" in index
    assert "nobody" not in index
    assert answers.plot("masking") == answers.plot("none_such") == "Not measured yet.\n"
    shown = answers.plot("ladder")
    assert shown.startswith("![What does each step add?](docs/ladder.svg)\n\npi0, default: from ")
    assert "experiments/results/ladder/nvidia-h200.md" in shown


def test_a_changed_result_changes_its_table(tmp_path):
    [file, *_] = sorted((RESULTS / "stacks").rglob("*.json"))
    target = tmp_path / "stacks" / "nvidia-h200" / file.name
    target.parent.mkdir(parents=True)
    record = json.loads(file.read_text())
    record["metrics"]["latency_ms/p50"] = 99.87
    target.write_text(json.dumps(record))
    [page] = files.written(chapters(["stacks"], lambda names: sources.committed(names, tmp_path))).values()
    assert "99.87" in page


@pytest.mark.slow  # two stores
def test_own_runs_and_committed_results_come_together(tmp_path):
    """The user's store is read and not written; a result that is in both stands there once."""
    shared, mine, theirs = (fakes.made("toy", (f"stack={name}",), 10.0) for name in ("2_sdpa", "0_eager", "8_compiled"))
    root, results = tmp_path / "root", tmp_path / "results"
    store = Store.open(root=root)
    for record in (shared, mine):
        store.import_record(record)
        write_record(shared, results)
    write_record(theirs, results)
    found = sources.tracked(["toy"], None, root, results)["toy"]["nvidia-h200"]
    assert sorted(one["params"]["stack"] for one in found) == ["0_eager", "2_sdpa", "8_compiled"]
    assert {one.record["params"]["stack"] for one in store.runs("toy")} == {"2_sdpa", "0_eager"}


def test_a_run_of_the_store_is_not_later_than_a_file_for_being_there(tmp_path):
    own, file = (fakes.made("toy", (), ms, prints=fakes.at(time)) for ms, time in ((30.0, "08"), (20.0, "09")))
    Store.open(root=tmp_path / "root").import_record(own)
    write_record(file, tmp_path / "results")
    found = sources.tracked(["toy"], None, tmp_path / "root", tmp_path / "results")["toy"]["nvidia-h200"]
    assert latest(found) == [file]


def test_without_a_store_none_is_created(tmp_path):
    write_record(fakes.made("toy", (), 10.0), tmp_path / "results")
    found = sources.tracked(None, None, tmp_path / "none", tmp_path / "results")
    assert list(found) == ["toy"]
    assert not (tmp_path / "none").exists()


def test_unknown_study_ends_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sources, "tracked", lambda names, uri, root: sources.committed(names))
    assert command.main(["nope"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pi0exp: nope: no such study, and none of the store; there are ")
    assert "stacks" in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "tracked", lambda names, uri, root: sources.committed(names))
    (tmp_path / "file").write_text("")
    assert command.main(["stacks", "--html", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"pi0exp: {tmp_path}/file/index.html: ")


def test_tables_are_printed_and_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(sources, "tracked", lambda names, uri, root: {})
    assert command.main(["ladder"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# ladder\n\nWhat does each optimization add")
    assert "Not measured yet." in printed


def test_help_has_examples_and_exit_codes():
    told = command.parser().format_help()
    assert "examples:" in told
    assert "exit codes:" in told
