"""Whatever happens to the measuring process or to the command, the store says what, and nothing is left running."""

import json
import os
import signal
import subprocess
import time

import faults
import pytest
from cli import TESTS, TOY, artifact, error_line, pi0exp, processes, runs, start
from toy_subjects import Toy

from pi0exp import isolate
from pi0exp.errors import UserError
from pi0exp.measure import guarded, measure
from pi0exp.result import Outcome

SETTINGS = {
    "device": "cpu",
    "warmup_calls": 1,
    "warmup_s": 0.0,
    "warmup_max_s": 0.0,
    "samples": 3,
    "host_samples": 1,
    "ci_share": None,
}


def plain(fault: str) -> dict:
    return {"subject": {"_target_": "toy_subjects.Toy", "fault": fault}, "measure": SETTINGS}


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """A toy with a fault, measured in a process of its own; afterwards no process is left."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(isolate.tempfile, "tempdir", str(tmp_path))
    told = []

    def run(fault: str, timeout_s: float = 120):
        result = isolate.measure_isolated(plain(fault), timeout_s, told.append)
        assert f"fault {fault}" in told or result.outcome is Outcome.TIMEOUT
        return result

    yield run
    assert processes(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_toy_is_measured():
    result = measure(plain("none"))
    assert result.outcome is Outcome.OK
    assert result.metrics["throughput_hz"] == pytest.approx(2000 / result.metrics["latency_ms/p50"])
    assert result.metrics["toy/calls"] == 1
    assert result.metrics["startup_s/build"] == 0.5


@pytest.mark.parametrize(("fault", "reason"), [("late", "no second call"), ("lacking", "no wheels")])
def test_what_only_the_option_itself_can_tell_is_unsupported(fault, reason):
    result = guarded(plain(fault))
    assert result.outcome is Outcome.UNSUPPORTED
    assert [text.endswith(reason) for text in result.reasons] == [True]
    assert result.metrics == {}


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("crash", "error", "RuntimeError: the toy broke"),
        ("abort", "error", "the measuring process died of SIGABRT"),
        ("kill", "error", "the measuring process was killed (SIGKILL)"),
        ("loud", "error", "RuntimeError: hoarse"),
        ("half", "error", "the measuring process wrote a result that cannot be read: Unterminated string"),
        ("orphan", "ok", ""),
        ("late", "unsupported", "the toy takes no second call"),
        pytest.param("lacking", "unsupported", "the toy has no wheels", marks=pytest.mark.slow),
        pytest.param("silent", "error", "ended with code 0 and no result", marks=pytest.mark.slow),
        pytest.param("two", "error", "ended with code 2 and no result", marks=pytest.mark.slow),
        pytest.param("foreign", "error", "a result that is ok must carry latency_ms/p50", marks=pytest.mark.slow),
        pytest.param("oom", "oom", "Tried to allocate 9 TiB", marks=pytest.mark.slow),
        pytest.param("host_oom", "oom", "the host ran out of memory", marks=pytest.mark.slow),
        pytest.param("wrong", "wrong_numerics", "the toy is not what it was", marks=pytest.mark.slow),
    ],
)
def test_fault_becomes_an_outcome(isolated, fault, outcome, reason):
    result = isolated(fault)
    assert result.outcome == outcome
    assert [reason in found for found in result.reasons] == [True] * bool(reason)
    if outcome == "ok":
        assert result.log == ""
        return
    assert not any(name.startswith(("latency", "throughput")) for name in result.metrics)
    if fault == "loud":
        assert len(result.log) <= isolate.LOG_LINES * isolate.LINE_BYTES
    else:
        assert f"about to {fault}" in result.log
    if fault == "crash":
        assert "in build" in result.log, "the traceback"


@pytest.mark.parametrize("fault", ["hang", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_hanging_process_is_ended(isolated, fault):
    started = time.monotonic()
    result = isolated(fault, timeout_s=1 if fault == "hang" else 15)
    assert time.monotonic() - started < 30
    assert result.outcome is Outcome.TIMEOUT
    assert "(measure.timeout_s)" in result.reasons[0]


def test_what_the_process_cannot_read_is_the_users(isolated):
    with pytest.raises(UserError, match=r"^subject.fault is refuse; choose another$"):
        isolated("refuse")


def sweep(root, *names: str) -> subprocess.CompletedProcess[str]:
    return pi0exp(root, *TOY, "~workload", "~model", "-m", f"+subject.fault={','.join(names)}")


def test_sweep_goes_on_after_a_fault(tmp_path):
    done = sweep(tmp_path, "kill", "input", "unmet")
    assert done.returncode == 5, done
    found = runs(tmp_path)
    assert [run.data.tags["outcome"] for run in found] == ["error", "unsupported"]
    assert [run.data.params["subject.fault"] for run in found] == ["kill", "unmet"]
    assert "about to kill" in artifact(tmp_path, found[0], "log.txt").read_text()
    table = done.stdout.split("#  subject.fault")[1]
    assert [line.split()[1] for line in table.splitlines() if line[:1].isdigit()] == ["kill", "input", "unmet"]
    assert "refused: subject.fault is input" in table


@pytest.mark.slow
def test_every_fault_of_a_sweep_is_recorded(tmp_path):
    faults = ["none", "wrong", "kill", "unmet", "refuse", "input"]
    done = sweep(tmp_path, *faults)
    assert done.returncode == 5, done
    outcomes = ["ok", "wrong_numerics", "error", "unsupported", "error"]
    found = runs(tmp_path)
    assert [run.data.tags["outcome"] for run in found] == outcomes
    assert [run.info.status for run in found] == ["FINISHED", "FAILED", "FAILED", "FINISHED", "FAILED"]
    assert [run.data.params["subject.fault"] for run in found] == faults[:5]
    assert ["latency_ms/p50" in run.data.metrics for run in found] == [True, False, False, False, False]
    assert found[1].data.metrics["error/rel_l2"] == 0.25
    assert found[4].data.tags["reasons"] == "UserError: subject.fault is refuse; choose another"
    assert {run.data.tags["gpu"] for run in found} == {"CPU"}
    records = [json.loads(artifact(tmp_path, run, "result.json").read_text()) for run in found]
    assert {record["fingerprint"]["gpu"] for record in records} == {"CPU"}
    assert {record["numerics"] for record in records} == {"REORDERED"}
    assert "about to kill" in artifact(tmp_path, found[2], "log.txt").read_text()
    card, table = done.stdout.split("#  subject.fault")
    assert "about to kill" in card, "the card ends with the end of the log"
    assert [line.split()[1] for line in table.splitlines() if line[:1].isdigit()] == faults
    assert "refused: subject.fault is input" in table
    told = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert told == [f"pi0exp: subject.fault is {fault}; choose another" for fault in ("refuse", "input")]

    again = sweep(tmp_path, "none", "wrong", "unmet")
    assert again.returncode == 4
    assert len(runs(tmp_path)) == 6, "what is ok or unsupported is not repeated, what went wrong is"


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("crash", 5), ("unmet", 3), ("wrong", 4), ("input", 2), ("refuse", 2)])
def test_exit_code_of_a_single_point(tmp_path, fault, code):
    assert pi0exp(tmp_path, *TOY, f"+subject.fault={fault}").returncode == code


@pytest.mark.slow
def test_timeout_is_a_setting(tmp_path):
    done = pi0exp(tmp_path, *TOY, "+subject.fault=hang", "measure.timeout_s=1")
    assert done.returncode == 5
    [run] = runs(tmp_path)
    assert run.data.tags["outcome"] == "timeout"
    assert run.data.tags["reasons"] == "no result after 1 s (measure.timeout_s)"


def interrupted(root, number: int, group: bool, *words: str) -> subprocess.CompletedProcess[str]:
    """Send a signal once the measuring process hangs."""
    process = start(root, *TOY, *words)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "fault hang" in line:
            break
    else:
        pytest.fail(f"it never hung: {''.join(seen)}")
    assert processes(root / "pi0exp-"), "the measuring process runs"
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert processes(root / "pi0exp-") == []
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.slow),
    ],
)
def test_interrupted_point(tmp_path, number, group):
    row = faults.by_name(number.name)
    done = interrupted(tmp_path, number, group, "+subject.fault=hang", f"track.results={tmp_path}/results")
    assert error_line(done, code=row.code) == row.reason.replace("stopped", "interrupted")
    [run] = runs(tmp_path)
    assert run.data.tags["outcome"] == row.outcome
    assert run.data.tags["reasons"] == row.reason
    assert run.info.status == "KILLED"
    assert json.loads(artifact(tmp_path, run, "result.json").read_text())["outcome"] == "interrupted"
    assert list((tmp_path / "results").iterdir()) == [], "an interruption is no result for others"


@pytest.mark.slow
def test_interrupted_sweep_stops_and_keeps_what_it_has(tmp_path):
    done = interrupted(tmp_path, signal.SIGINT, True, "-m", "+subject.fault=none,hang,crash")
    assert done.returncode == 130
    found = runs(tmp_path)
    assert [run.data.tags["outcome"] for run in found] == ["ok", "interrupted"]
    assert [run.info.status for run in found] == ["FINISHED", "KILLED"]
    assert found[0].data.metrics["latency_ms/p50"] > 0


@pytest.mark.slow
def test_hanging_point_of_a_sweep_is_ended_and_the_others_are_measured(tmp_path):
    row = faults.by_name("hang")
    done = pi0exp(tmp_path, *TOY, "measure.timeout_s=40", "-m", "+subject.fault=stubborn,none")
    assert done.returncode == row.code, done
    hung, other = runs(tmp_path)
    assert (hung.data.tags["outcome"], other.data.tags["outcome"]) == (row.outcome, "ok")
    assert row.reason in hung.data.tags["reasons"]
    assert "about to stubborn" in artifact(tmp_path, hung, "log.txt").read_text()
    assert done.stdout.splitlines()[-1].startswith("study adhoc: 1 of 2 points settled; missing: #0 timeout")
    assert processes(tmp_path / "pi0exp-") == []


def test_toy_has_the_faults_it_is_asked_for():
    with pytest.raises(AttributeError):
        Toy("flood").build(None, 8, print)
