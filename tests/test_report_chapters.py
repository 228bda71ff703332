"""Which machine speaks for a study, and what its chapter says of it: days, commands, what counts of several."""

import pytest
import report_fakes as fakes

from pi0exp.load import write_record
from pi0exp.report import document, sources
from pi0exp.report.study import Study


def test_commands_measure_as_it_was_measured():
    one = Study("ladder", commands=("python -m pi0exp study=ladder track.results=experiments/results",))
    quick = fakes.made("ladder", ("stack=2_sdpa", "measure=quick"), 20.0)
    slow, tiny = fakes.made("ladder", (), 30.0), fakes.made("ladder", ("stack=2_sdpa", "model=tiny"), 1.0)
    for records, words in (
        ([quick], " measure=quick"),
        ([quick, slow], ""),
        ([tiny], " model=tiny"),
        ([tiny, slow], ""),
    ):
        made = fakes.chaptered(one, records)
        assert made.commands(made.machines[0]) == (f"{one.commands[0]}{words}",)


@pytest.mark.parametrize("other", [("model=tiny",), ()], ids=["a small model", "no GPU"])
def test_what_is_no_pi0_on_a_gpu_does_not_answer_for_it(other):
    later = fakes.made("toy", other, 10.0, prints=fakes.at("09") | {"gpu": "Z"} | ({} if other else {"vendor": "cpu"}))
    earlier = fakes.made("toy", (), 10.0, prints=fakes.at("08"))
    assert document.chapter(Study("toy"), sources.sorted_out([later, earlier]), ()).last.gpu == "NVIDIA H200"


def test_a_record_that_does_not_say_its_day_is_shown():
    prints = {name: value for name, value in fakes.H200.items() if name not in ("date", "driver", "commit")}
    made = fakes.chaptered(Study("toy"), [fakes.made("toy", (), 10.0, prints=prints)])
    assert made.machines[0].about.startswith("NVIDIA H200, driver -, torch 2.11.0, day unknown, commit unknown")


def test_of_one_day_the_latest_counts_whatever_its_file_is_called(tmp_path):
    """An older record says the day only, and comes before those that say the time. What is printed stays a day."""
    points = [
        fakes.made("toy", ("stack=2_sdpa",), float(10 + i), prints=fakes.at(t)) for i, t in enumerate(("", "09", "23"))
    ]
    for keys in ("123", "321", "312"):
        for one, digit in zip(points, keys, strict=True):
            write_record(one | {"key": digit * 16}, tmp_path / keys)
        found = sources.committed(["toy"], tmp_path / keys)
        assert [one["key"][0] for one in found["toy"]["nvidia-h200"]] == list(keys)
        [machine] = document.chapter(Study("toy"), found, ()).machines
        assert [row.p50 for row in machine.rows] == [12.0]
        assert machine.date == "2026-01-02"
        assert "2026-01-02, commit" in machine.about


def test_the_machine_that_measured_last_answers():
    early = fakes.made("toy", (), 10.0, prints=fakes.at("08"))
    late = fakes.made("toy", (), 10.0, prints=fakes.at("09") | {"gpu": "Z"})
    assert document.chapter(Study("toy"), sources.sorted_out([late, early]), ()).last.gpu == "Z"


def test_a_few_points_of_a_later_machine_do_not_answer_for_all():
    study = Study("toy", planned=({"stack": "2_sdpa"}, {"stack": "9_kernels"}))
    whole = [fakes.made("toy", (f"stack={name}",), 10.0, prints=fakes.at("08")) for name in ("2_sdpa", "9_kernels")]
    later = fakes.made("toy", ("stack=2_sdpa",), 10.0, prints=fakes.at("09") | {"gpu": "Z"})
    made = document.chapter(study, sources.sorted_out([*whole, later]), ())
    assert (made.last.gpu, made.last.lacks) == ("NVIDIA H200", 0)
    assert [machine.lacks for machine in made.machines] == [0, 1]
