"""Do not regress: what the gate calls a regression, what it overlooks, and the file that it holds runs against."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli import QUICK, runs
from made_records import refusal, times
from scipy import stats

from pi0exp import baseline, compose, gate, intervals, point
from pi0exp.baseline import Entry, changed, read_baseline
from pi0exp.errors import UserError
from pi0exp.result import Outcome

WORDS = ("model=tiny", "measure.device=cpu")
NAME = "0_eager model=tiny measure.device=cpu"


class Machine:
    """Stands in for pi0exp.point.measure_point: runs whose p50 and error are set, and what they were asked."""

    def __init__(self) -> None:
        self.p50_ms, self.error, self.asked = 10.0, 0.004, []
        self.outcome, self.reasons = Outcome.OK, []

    def measure_point(self, plain):
        self.asked.append(plain)
        metrics = {"latency_ms/p50": float(np.median(times(self.p50_ms, len(self.asked)))), "error/rel_l2": self.error}
        ok = self.outcome is Outcome.OK
        return {"metrics": metrics if ok else {}, "outcome": self.outcome.value, "reasons": self.reasons}


@cache
def composed(*words: str):
    return compose.from_words(words)


@pytest.fixture
def machine(monkeypatch):
    """It composes the same words once: that takes half a second."""
    made = Machine()
    monkeypatch.setattr(gate, "compose", SimpleNamespace(from_words=lambda words: deepcopy(composed(*words))))
    monkeypatch.setattr(point, "measure_point", made.measure_point)
    return made


@pytest.fixture
def file(tmp_path, machine, capsys):
    """The baseline of one stack."""
    path = tmp_path / "gate.json"
    assert run(path, "--update", "--stack", "0_eager", *WORDS) == 0
    capsys.readouterr()
    machine.asked.clear()
    return path


def run(path, *words) -> int:
    return gate.main(["--baseline", str(path), *map(str, words)])


def refused(capsys, path, *words) -> str:
    return refusal(capsys, gate.main, "--baseline", path, *words)


def test_update_writes_what_was_measured(file):
    found = json.loads(file.read_text())
    assert found["format"] == 1
    [(name, entry)] = found["points"].items()
    assert name == NAME
    assert entry["words"] == ["stack=0_eager", *WORDS]
    assert len(entry["p50_ms"]) == len(entry["error"]) == 3
    assert entry["p50_ms"][0] == pytest.approx(10, rel=0.01)
    assert set(entry["error"]) == {0.004}
    assert {"commit", "date", "versions"} <= entry["fingerprint"].keys()


def test_the_same_passes(file, machine, capsys, tmp_path):
    assert run(file, "--root", tmp_path / "kept here") == 0
    assert "no regression" in capsys.readouterr().out
    assert len(machine.asked) == 3
    for plain in machine.asked:
        assert (plain["name"], plain["resume"], plain["track"]["root"]) == ("gate", False, str(tmp_path / "kept here"))


def test_slower_is_a_regression(file, machine, capsys):
    machine.p50_ms = 10.5
    assert run(file, "--json") == gate.REGRESSED == 1
    found = json.loads(capsys.readouterr().out)
    assert found["regressed"] is True
    [check] = found["checks"]
    assert check["ratio"]["low"] > 1.02
    [fault] = check["faults"]
    assert fault.startswith("slower by 5.") or fault.startswith("slower by 4.9")
    assert run(file, "--margin", "0.1") == 0


def test_within_the_margin_passes(file, machine):
    machine.p50_ms = 10.1
    assert run(file) == 0
    assert run(file, "--margin", "0.002") == 1


def test_faster_passes_and_says_so(file, machine, capsys):
    machine.p50_ms = 9.0
    assert run(file) == 0
    assert "--update keeps it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("error", "code"), [(0.0049, 0), (0.0051, 1), (0.001, 0)])
def test_a_larger_error_is_a_regression(file, machine, capsys, error, code):
    machine.error = error
    assert run(file, "--json") == code
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert check["faults"] == ["the error grew from 0.004 to 0.0051, by more than 25 %"] * code


def test_an_error_where_there_was_none_is_a_regression():
    entry = Entry(["stack=0_eager", *WORDS], [10.0, 10.1, 10.2], [0.0] * 3)
    runs = [{"outcome": "ok", "metrics": {"latency_ms/p50": 10.0 + i / 10, "error/rel_l2": 1e-9}} for i in range(3)]
    assert "the error grew" in gate.judge("x", entry, runs, 0.02, 0.25).faults[0]


def test_no_longer_ok_is_a_regression_and_stops_that_stack(file, machine, capsys):
    machine.outcome, machine.reasons = Outcome.WRONG_NUMERICS, ["observation 3 is too far"]
    assert run(file, "--json") == 1
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert check["faults"] == ["ended as wrong_numerics: observation 3 is too far"]
    assert len(machine.asked) == 1


def test_runs_that_hide_their_error_are_refused(file, machine, capsys):
    machine.error = float("nan")
    del_error = machine.measure_point

    def without(plain):
        found = del_error(plain)
        del found["metrics"]["error/rel_l2"]
        return found

    point.measure_point = without  # undone by the fixture
    assert "no error/rel_l2" in refused(capsys, file)


def test_update_keeps_other_entries_and_the_same_stack_on_another_workload(file, machine, capsys):
    machine.p50_ms = 7.0
    assert run(file, "--update", "--stack", "0_eager", *WORDS, "workload=masked") == 0
    _, entries = read_baseline(file)
    assert list(entries) == [NAME, f"{NAME} workload=masked"]
    assert [round(np.median(entry.p50_ms)) for entry in entries.values()] == [10, 7]


def test_both_workloads_are_checked(file, machine, capsys):
    run(file, "--update", "--stack", "0_eager", *WORDS, "workload=masked")
    machine.asked.clear()
    assert run(file, "--stack", "0_eager") == 0
    assert len(machine.asked) == 6
    order = [plain["names"]["workload"] for plain in machine.asked]
    assert order == ["default", "masked"] * 3  # repeats outermost


def test_nothing_is_written_over_by_a_failure(file, machine, capsys):
    before = file.read_text()
    machine.outcome, machine.reasons = Outcome.ERROR, ["it broke"]
    assert "ended as error: nothing is written" in refused(capsys, file, "--update")
    assert file.read_text() == before


def test_best_stacks_are_those_that_can_run(monkeypatch):
    known = SimpleNamespace(from_words=lambda words: deepcopy(composed(*words)), files=compose.files)
    monkeypatch.setattr(gate, "compose", known)
    cpu = gate.target_machine(gate.config.Device.cpu)[0]
    gpu = replace(cpu, gpu="NVIDIA H200", vendor="nvidia", arch="sm_90", memory_mb=140_000)
    monkeypatch.setattr(gate, "target_machine", lambda device: (cpu, []))
    with pytest.raises(UserError, match="no stack called best can run on this machine"):
        gate.best_stacks([])
    monkeypatch.setattr(gate, "target_machine", lambda device: (gpu, []))
    assert gate.best_stacks([]) == ["fork_best", "h200_best"]


def test_noise_is_told(file, machine, capsys, monkeypatch):
    spread = iter([9.0, 10.0, 11.0])
    monkeypatch.setattr(
        point,
        "measure_point",
        lambda plain: {
            "outcome": "ok",
            "reasons": [],
            "metrics": {"latency_ms/p50": next(spread), "error/rel_l2": 0.004},
        },
    )
    assert run(file) == 0
    assert "would not be seen" in " ".join(capsys.readouterr().out.split())


def test_another_machine_is_refused_before_anything_is_measured(file, machine, capsys):
    found = json.loads(file.read_text())
    found["machine"]["gpu"] = "Other GPU"
    file.write_text(json.dumps(found))
    for words in ((), ("--update",)):
        assert "the baseline of another machine (gpu Other GPU, here CPU)" in refused(capsys, file, *words)
    assert machine.asked == []


def test_what_changed_since_the_baseline_is_shown(file, capsys):
    found = json.loads(file.read_text())
    [entry] = found["points"].values()
    entry["fingerprint"]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(found))
    assert run(file) == 0
    assert "since the baseline: torch 1.0 -> " in capsys.readouterr().out
    before = {"driver": "1", "versions": {"a": "1", "b": "2"}, "date": "2026"}
    assert changed(before, {"driver": "2", "versions": {"a": "1"}}) == ["driver 1 -> 2", "b 2 -> -"]


ENTRY = {"words": ["stack=0_eager"], "p50_ms": [1.0, 1.0, 1.1], "error": [0.1, 0.1, 0.1]}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "no such file; --update writes it"),
        ("{", "not a whole baseline"),
        ("[1, 2]", "no JSON object with format 1"),
        ('{"traceEvents": []}', "no JSON object with format 1"),
        (json.dumps({"format": 1, "key": "a" * 16, "metrics": {}}), "no JSON object with format 1 and points"),
        (json.dumps({"format": 1, "machine": {}, "points": {}}), "it holds no points"),
        ({"p50_ms": [1.0, 1.0]}, "p50_ms must list 3 processes or more"),
        ({"p50_ms": [1.0, 1.0, float("nan")]}, "p50_ms holds nan"),
        ({"p50_ms": [1.0, 1.0, 0.0]}, "p50_ms holds 0.0; it must be above 0"),
        ({"p50_ms": [1.0, 1.0, "2"]}, "p50_ms holds '2'"),
        ({"error": [0.1, 0.1, float("inf")]}, "error holds inf"),
        ({"error": [0.1, 0.1, -0.1]}, "error holds -0.1; it must be 0 or more"),
        ({"error": None}, "error must list 3 processes"),
        ({"words": "stack=0_eager"}, "it must be a list of words"),
        ({"words": ["attention=sdpa"]}, "stack=NAME comes first"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_files_that_are_no_baseline(tmp_path, capsys, machine, text, what):
    path = tmp_path / "gate.json"
    if isinstance(text, dict):
        text = json.dumps({"format": 1, "machine": {}, "points": {"x": ENTRY | text}})
    if text is not None:
        path.write_text(text)
    told = refused(capsys, path)
    assert str(path) in told
    assert what in told
    assert machine.asked == []


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--processes", "2"), "--processes 2: 3 or more"),
        (("--margin", "-1"), "--margin -1.0: a share, 0 or more"),
        (("--error-margin", "nan"), "--error-margin nan: a share, 0 or more"),
        (("workload=masked",), "workload=masked: words go with --update"),
        (("--stack", "8_compiled"), "no stack 8_compiled; there are 0_eager"),
        (("--update", "--stack", "fastest"), "fastest"),
    ],
)
def test_words_that_make_no_sense(file, capsys, machine, words, what):
    assert what in refused(capsys, file, *words)
    assert machine.asked == []


def test_a_place_that_takes_no_file_is_found_before_measuring(tmp_path, capsys, machine):
    (tmp_path / "plain").write_text("")
    for place in (tmp_path / "plain" / "gate.json", tmp_path):
        refused(capsys, place, "--update", "--stack", "0_eager", *WORDS)
    assert machine.asked == []


def test_a_file_is_written_whole_or_not_at_all(file, monkeypatch):
    before = file.read_text()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(baseline.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        baseline.write_baseline(file, gate.target_machine(gate.config.Device.cpu)[0], read_baseline(file)[1])
    assert file.read_text() == before


def judged(random, shift: float, drift: float) -> bool:
    """Three processes each that scatter by 0.3 %, and a machine that is by `drift` another one on another day."""
    before, now = 10 * np.exp(0.003 * random.standard_normal((2, 3)))
    now = now * (1 + shift) * (1 + drift)
    runs = [{"outcome": "ok", "metrics": {"latency_ms/p50": one, "error/rel_l2": 0.0}} for one in now.tolist()]
    entry = Entry(["stack=0_eager", *WORDS], before.tolist(), [0.0] * 3)
    return bool(gate.judge("x", entry, runs, gate.MARGIN, gate.ERROR_MARGIN).faults)


def test_false_alarms_are_rarer_than_stated_and_slowdowns_are_seen(monkeypatch):
    monkeypatch.setattr(gate, "fingerprint", lambda machine: {})
    monkeypatch.setattr(gate, "compose", SimpleNamespace(from_words=lambda words: {}))
    monkeypatch.setattr(gate, "config", SimpleNamespace(measure=lambda plain: SimpleNamespace(device=None)))
    monkeypatch.setattr(gate, "target_machine", lambda device: (None, []))
    random, count = np.random.default_rng(1), 500
    alarms = sum(judged(random, 0.0, drift) for drift in random.uniform(-0.01, 0.01, count))
    assert alarms <= stats.binom.ppf(0.999, count, (1 - intervals.CONFIDENCE) / 2)
    assert sum(judged(random, 0.05, 0.0) for _ in range(count)) > 0.9 * count


@pytest.mark.slow
def test_whole_children(tmp_path, capsys, monkeypatch):
    """Update, pass, and fail: a subject that has become slower. The store holds the runs as study gate.

    It becomes ten times slower, not a little: with three processes on a busy machine, one of them half as slow again
    by chance makes the interval of the ratio four times as wide to either side.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    quick = [word for word in QUICK if not word.startswith("model=")]
    toy = ["subject._target_=paced_subject.Paced", *quick, "measure.samples=30"]
    path, root = tmp_path / "gate.json", ("--root", tmp_path)
    assert run(path, "--update", "--stack", "0_eager", *toy, "+subject.ms=1.0", *root) == 0
    assert run(path, *root, "--margin", "0.2") == 0
    found = json.loads(path.read_text())
    [entry] = found["points"].values()
    entry["words"][-1] = "+subject.ms=10.0"
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert run(path, *root, "--margin", "0.2", "--json") == 1
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert check["ratio"]["low"] > 1.2
    assert check["now_ms"] / check["baseline_ms"] == pytest.approx(10, rel=0.5)
    assert len(runs(tmp_path, "gate")) == 9
