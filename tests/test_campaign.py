"""Studies one after the other: what is told of them, and what stops the next one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import report_fakes as fakes
from cli import TESTS, environment, heed_signals

from pi0exp import machine, sweep
from pi0exp.experiments import campaign
from pi0exp.load import write_record
from pi0exp.machine import this_machine
from pi0exp.result import Outcome
from pi0exp.track import Store


class Process:
    """For `python -m pi0exp study=NAME`: settles all of ladder, misses a point of masking, dies in all others."""

    def __init__(self, command, **_):
        study = command[3].removeprefix("study=")
        self.text = {
            "ladder": "study ladder: 2 of 2 points settled, complete\n",
            "masking": "study masking: 1 of 2 points settled; missing: #1 oom; the same command again measures only\n",
        }.get(study, "")
        self.returncode = {"ladder": 0, "masking": 5}.get(study, 1)

    def communicate(self, timeout=None):
        return self.text, None


def test_one_that_fails_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Process)
    code = campaign.main(["breakdown", "masking", "ladder", "--quick", "--results", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()[-3:]
    assert code == 1
    assert told[0].startswith("breakdown: failed with exit code 1")
    assert told[1].startswith("masking: missing: #1 oom, 1 of 2 points settled")
    assert told[2].startswith("ladder: complete, 2 of 2 points settled")
    kept = [json.loads(line) for line in (tmp_path / "campaign.jsonl").read_text().splitlines()]
    assert [(row["study"], row["words"]) for row in kept] == [
        (name, ["measure=quick"]) for name in ("breakdown", "masking", "ladder")
    ]


@pytest.mark.parametrize(
    ("number", "name", "code", "send"),
    [
        (signal.SIGINT, "Ctrl-C", 130, os.kill),
        (signal.SIGINT, "Ctrl-C", 130, os.killpg),  # as a terminal does
        (signal.SIGTERM, "SIGTERM", 143, os.kill),
        (signal.SIGHUP, "SIGHUP", 129, os.kill),
    ],
)
def test_signal_reaches_the_study_and_nothing_that_was_told_is_lost(tmp_path, number, name, code, send):
    command = [sys.executable, str(TESTS / "stand_in.py"), str(tmp_path), "ladder", "masking", "--results"]
    process = subprocess.Popen(
        [*command, str(tmp_path)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    send(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "signals").read_text() == f"{number.name}\n", "once"
    assert out.splitlines() == [
        "its first point",
        f"ladder: interrupted by {name}; time needed: not known",
        "masking: not begun; time needed: not known",
    ]
    assert err.splitlines() == ["campaign: ladder", f"campaign: interrupted by {name}"]
    [row] = [json.loads(line) for line in (tmp_path / "campaign.jsonl").read_text().splitlines()]
    assert (row["study"], row["state"], row["code"]) == ("ladder", f"interrupted by {name}", 130)


def test_at_the_limit_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert campaign.main(["--minutes", "0", "--results", str(tmp_path), "ladder"]) == 1
    assert "ladder: not begun" in capsys.readouterr().out


def test_unknown_study_is_named(tmp_path, capsys):
    assert campaign.main(["none_such", "--results", str(tmp_path)]) == 2
    assert "none_such: no such study; there are ladder, " in capsys.readouterr().err


def test_one_torn_file_keeps_no_other_one_out(tmp_path, capfd):
    good = fakes.made("ladder", ("stack=0_eager",), 160.0)
    write_record(good, tmp_path).with_name(f"{'0' * 16}.json").write_text("{")
    campaign.bring_in(tmp_path / "ladder", tmp_path / "store")
    assert Store.open(root=tmp_path / "store").settled("ladder", good["key"]).record == good
    [told] = [line for line in capfd.readouterr().err.splitlines() if str(tmp_path / "ladder") in line]
    assert told.startswith("left out: ")


def test_files_that_do_not_come_in_are_told(tmp_path, capfd):
    write_record(fakes.made("ladder", ("stack=0_eager",), 160.0), tmp_path)
    (tmp_path / "store").write_text("in the place of the folder")
    campaign.bring_in(tmp_path / "ladder", tmp_path / "store")
    assert f"campaign: {tmp_path}/ladder: not in the store" in capfd.readouterr().err


@pytest.fixture
def on_h200(monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: replace(this_machine(), gpu=fakes.H200["gpu"]))


@pytest.mark.usefixtures("on_h200")
def test_missing_points_are_those_without_a_settled_file_of_this_gpu(tmp_path):
    """Whatever code made the file; one of another model or GPU, or that ended badly, does not count."""
    base = ("stack=h200_best", "workload=masked", "workload.prompt_padded=48")
    there = fakes.made("ablation", (*base, "graphs=none"), 160.0)
    other_model = fakes.made("ablation", (*base, "model=pi05", "attention=sdpa"), 15.0)
    other_gpu = fakes.made("ablation", (*base, "attention=eager"), 20.0, prints=fakes.H200 | {"gpu": "NVIDIA B200"})
    broken = fakes.failed("ablation", (*base, "fusion=projections"), Outcome.ERROR, "torn")
    for record in (there, other_model, other_gpu, broken):
        write_record(record, tmp_path).with_name(f"{'0' * 16}.json").write_text("{")  # nor does one that is torn
    lines, words = campaign.lacking("ablation", tmp_path, ["measure=quick"])
    assert words == ["measure=quick"]
    assert len(lines) == 21
    assert "graphs=none" not in lines
    assert {"attention=sdpa", "attention=eager", "fusion=projections"} <= {*lines}
    lines, _ = campaign.lacking("ablation", tmp_path, ["measure=quick", "model=pi05"])
    assert "attention=sdpa" not in lines
    assert "graphs=none" in lines


@pytest.mark.usefixtures("on_h200")
def test_record_of_other_dimensions_is_none_of_the_named_model(tmp_path):
    """No parameter tells it: its model is called pi0 like that of the study."""
    depth = "model.vision.depth=2"
    small = fakes.made("ladder", ("workload=default", "stack=2_sdpa", depth), 5.0)
    older = fakes.made("ladder", ("workload=default", "stack=3_skip"), 30.0)
    older["experiment"] = older["experiment"] | {"model": {**older["experiment"]["model"]}}
    del older["experiment"]["model"]["norm_eps"]  # as if it could be set since
    for record in (small, older):
        write_record(record, tmp_path)
    lines, _ = campaign.lacking("ladder", tmp_path, [])
    assert "workload=default stack=2_sdpa" in lines
    assert "workload=default stack=3_skip" not in lines
    lines, words = campaign.lacking("ladder", tmp_path, [depth])
    assert words == [depth]
    assert "workload=default stack=2_sdpa" not in lines
    assert "workload=default stack=3_skip" in lines


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("study", ["ablation", "graph_capture", "masking"])
def test_missing_points_are_a_sweep_of_their_own(study, tmp_path):
    lines, _ = campaign.lacking(study, tmp_path, [])
    points = sweep.planned([f"study={study}", campaign.sweep_of(lines), "hydra.sweeper.params=null"])
    assert [" ".join(words) for words in points] == [f"study={study} {line}".replace("'", "") for line in lines]


@pytest.mark.usefixtures("on_h200")
def test_words_choose_among_missing_points(tmp_path, monkeypatch):
    lines, words = campaign.lacking("ladder", tmp_path, ["workload=masked", "measure=quick"])
    assert words == ["measure=quick"]
    assert lines
    assert all("workload=masked" in line for line in lines)
    began = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: began.append(command) or Process(command))
    for line in lines:
        write_record(fakes.made("ladder", tuple(line.split()), 10.0), tmp_path)
    assert campaign.main(["--missing", "ladder", "workload=masked", "--results", str(tmp_path)]) == 0
    assert began == []
    assert campaign.lacking("search", tmp_path, []) is None
    assert campaign.main(["--missing", "ladder", "--results", str(tmp_path)]) == 0
    assert began[0][4].startswith("track.results=")
    assert "workload=masked" not in " ".join(began[0])
    assert "workload=default stack=0_eager" in began[0][5]
