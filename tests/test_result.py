"""What a result may say: numbers only where the outcome allows them."""

import ast
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import pi0exp
from pi0exp.machine import Machine
from pi0exp.measure import fingerprint
from pi0exp.result import CONFIG_ERROR, TIMED, Outcome, Result, measured_at, record

TIMES = {"latency_ms/p50": 20.0, "latency_host_ms/p50": 21.0, "throughput_hz": 50.0, "roofline/share": 0.3}
TIMES |= {"latency_paced_ms/p50": 19.0, "stage_ms/vision": 2.0, "sampling/tau": 1.0, "power_w/mean": 500.0}
TIMES |= {"energy_j/call": 9.0, "perf_per_watt": 0.1, "roofline/share_sustained_vision": 0.4}
FAILURES = [outcome for outcome in Outcome if outcome is not Outcome.OK]


def test_exit_codes():
    assert {outcome.value: outcome.exit_code for outcome in Outcome} == {
        "ok": 0,
        "unsupported": 3,
        "wrong_numerics": 4,
        "unproven": 4,
        "oom": 5,
        "timeout": 5,
        "error": 5,
        "interrupted": 130,
    }
    assert CONFIG_ERROR == 2


def test_failures_are_measured_again():
    assert {outcome for outcome in Outcome if outcome.settled} == {Outcome.OK, Outcome.UNSUPPORTED}


def test_result_that_is_ok():
    made = Result("ok", metrics=TIMES, samples={"latency_ms": [20.0]})
    assert made.outcome is Outcome.OK


def test_result_that_is_ok_has_a_latency():
    with pytest.raises(ValueError, match="must carry latency_ms/p50"):
        Result(Outcome.OK, metrics={"throughput_hz": 50.0})


@pytest.mark.parametrize("outcome", FAILURES)
@pytest.mark.parametrize("name", [*TIMES, "latency_ms/p99", "latency_ms/anything"])
def test_failure_has_no_times(outcome: Outcome, name: str):
    with pytest.raises(ValueError, match=f"{outcome} must not carry {name}"):
        Result(outcome, ["because"], metrics={name: 1.0})


@pytest.mark.parametrize("outcome", FAILURES)
def test_failure_has_no_samples(outcome: Outcome):
    with pytest.raises(ValueError, match=f"{outcome} must not carry samples"):
        Result(outcome, ["because"], samples={"latency_ms": [20.0]})


@pytest.mark.parametrize("outcome", FAILURES)
def test_failure_says_why(outcome: Outcome):
    with pytest.raises(ValueError, match="must say why"):
        Result(outcome)
    assert Result(outcome, ["because"]).reasons == ["because"]


@pytest.mark.parametrize("outcome", FAILURES)
def test_failure_keeps_what_was_not_timed(outcome: Outcome):
    metrics = {"error/rel_l2": 0.5, "memory_mb/peak": 3.0, "roofline/floor_ms": 6.2, "warmup/calls": 20.0}
    assert Result(outcome, ["because"], metrics=metrics).metrics == metrics


def test_every_time_is_known_as_one():
    assert all(name.startswith(TIMED) for name in TIMES)
    assert not "roofline/floor_ms".startswith(TIMED)


def test_counters_of_every_option_are_no_times():
    """What is found wrong after it was timed carries them. Read from the source: most options that count need a GPU."""
    names, files = set(), sorted(Path(pi0exp.__file__).parent.rglob("*.py"))
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count_with":
            assert ast.unparse(node.args[0]).endswith(".counters"), "by this name they are found here"
        if isinstance(node, ast.FunctionDef) and node.name == "counters":
            # Of a name that is put together the first part.
            texts = (one.value for one in ast.walk(node) if isinstance(one, ast.Constant))
            names |= {text for text in texts if isinstance(text, str) and text != ast.get_docstring(node)}
    names = {name for name in names if "/" in name}
    assert {name.split("/")[0] for name in names} >= {"aiter", "compile", "graphs", "tunable"}
    assert [name for name in sorted(names) if name.startswith(TIMED)] == []


def test_unknown_outcome():
    with pytest.raises(ValueError, match="fine"):
        Result("fine")


def test_result_survives_json():
    made = Result("ok", metrics=TIMES, samples={"latency_ms": [20.0, 21.0]}, applied={"graphs": ["one graph"]})
    assert Result(**json.loads(json.dumps(made.to_dict()))) == made


def test_record_carries_point_and_result():
    made = record("abc", "ladder", {"graphs": "manual"}, {"graphs": {}}, Result("oom", ["too large"]))
    assert made["format"] == 1
    assert (made["key"], made["study"], made["params"], made["experiment"]) == (
        "abc",
        "ladder",
        {"graphs": "manual"},
        {"graphs": {}},
    )
    assert (made["outcome"], made["reasons"]) == ("oom", ["too large"])
    json.dumps(made)


def test_results_are_sorted_by_the_second_and_older_ones_by_the_day():
    new = fingerprint(Machine())
    day = datetime.now(UTC).date()
    assert datetime.fromisoformat(new["time"]).date() in (day, day - timedelta(days=1)), "midnight may lie between"
    assert new["time"].startswith(new["date"])
    prints = [
        {"date": "2026-01-01"},
        {"date": "2026-01-02"},
        {"date": "2026-01-02", "time": "2026-01-02T00:00:01+00:00"},
    ]
    assert measured_at({"fingerprint": new}) == new["time"]
    times = [measured_at({"fingerprint": one}) for one in prints]
    assert times == sorted(times)
