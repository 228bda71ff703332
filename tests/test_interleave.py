"""Two points that take turns in one process: order, pairs, refusals, and the child as a command."""

import json
import subprocess
import sys
import time

import pytest
from cli import QUICK, REPOSITORY, environment
from helpers import plain_config

from pi0exp import build, config, subject
from pi0exp.errors import UserError
from pi0exp.interleave import check_pair, interleave, measure_pair, measure_pair_isolated, pairs
from pi0exp.intervals import ROUNDS, SLOWER, of_rounds, word
from pi0exp.result import Outcome

MEASURE = {"device": "cpu", "warmup_calls": 2, "warmup_s": 0.0, "warmup_max_s": 0.0}


def paced(ms: float, **more: str) -> dict:
    return {"subject": {"_target_": "paced_subject.Paced", "ms": ms, **more}, "measure": MEASURE}


def pair(a: dict, b: dict, **more) -> dict:
    return {"a": a, "b": b, "rounds": ROUNDS, **more}


def test_blocks_alternate_and_inputs_rotate():
    calls = []
    taken = interleave(
        lambda index: calls.append(("A", index)),
        lambda index: calls.append(("B", index)),
        lambda call, index: call(index) or float(len(calls)),
        rounds=2,
        block=2,
    )
    one_round = [(side, index) for side in "ABBA" for index in (0, 1)]
    assert calls == 2 * one_round
    assert taken == ([1, 2, 7, 8, 9, 10, 15, 16], [3, 4, 5, 6, 11, 12, 13, 14])


def test_rounds_end_with_the_time_but_not_before_an_interval_is_possible():
    taken = interleave(lambda i: None, lambda i: None, lambda call, i: 1.0, rounds=30, block=1, max_s=0.0)
    assert len(taken[0]) == len(taken[1]) == 2 * ROUNDS


def test_pairs_are_geometric_means_of_the_medians_of_blocks():
    a, b = [1.0, 1.0, 9.0, 4.0, 4.0, 4.0], [2.0, 2.0, 2.0, 8.0, 0.0, 8.0]
    assert pairs(a, b, block=3) == [(2.0, 4.0)]


def test_steady_drift_cancels():
    """A clock that slows down by 20 % meanwhile; one stack after the other would look 10 % slower."""
    clock = [1 + 0.2 * step / 640 for step in range(640)]
    times = iter(clock)
    taken = interleave(lambda i: None, lambda i: None, lambda call, i: next(times), rounds=20, block=8)
    found = of_rounds(pairs(*taken, 8))
    assert found.ratio == pytest.approx(1, abs=1e-5)
    assert sum(clock[320:]) / sum(clock[:320]) > 1.09


def test_the_slower_one_is_found():
    result = measure_pair(pair(paced(0.3), paced(0.4)))
    assert result.outcome is Outcome.OK
    found = of_rounds(pairs(result.samples["baseline_latency_ms"], result.samples["latency_ms"], 8))
    assert found.ratio == pytest.approx(4 / 3, rel=0.1)
    assert word(found) == SLOWER
    assert result.metrics["baseline/latency_ms/p50"] == pytest.approx(0.3, rel=0.1)
    assert result.metrics["latency_ms/p50"] == pytest.approx(0.4, rel=0.1)
    assert len(result.samples["latency_ms"]) == len(result.samples["baseline_latency_ms"]) == ROUNDS * 2 * 8


@pytest.mark.parametrize("side", ["A", "B"])
def test_nothing_is_timed_where_one_is_wrong(side):
    right, wrong = paced(0.1), paced(0.1, wrong="it is another one")
    result = measure_pair(pair(wrong, right) if side == "A" else pair(right, wrong))
    assert result.outcome is Outcome.WRONG_NUMERICS
    assert result.reasons == [f"{side}: it is another one"]
    assert list(result.metrics) == ["baseline/error/rel_l2" if side == "A" else "error/rel_l2"]


def test_unsupported_names_the_side():
    result = measure_pair(pair(paced(0.1), paced(-1)))
    assert result.outcome is Outcome.UNSUPPORTED
    assert result.reasons == ["B: has no time at all"]


@pytest.mark.parametrize("rounds", [ROUNDS - 1, "many", 10.0])
def test_rounds_that_give_no_interval_are_refused(rounds):
    with pytest.raises(UserError, match=r"rounds is .*; an interval needs 10 or more"):
        measure_pair(pair(paced(0.1), paced(0.1), rounds=rounds))


@pytest.mark.parametrize(
    ("words", "others", "what"),
    [
        (("precision.tf32=true",), (), "precision"),
        (("gemm.library=cublaslt",), ("gemm.library=cublas",), "gemm"),
        (("gemm.addmm_lt=false",), (), "DISABLE_ADDMM_CUDA_LT, gemm"),
        (("gemm=tunable",), ("gemm=triton",), "gemm"),
    ],
)
def test_what_a_process_has_once_cannot_differ(words, others, what):
    a, b = (subject.subject(plain_config("model=tiny", *given)) for given in (words, others))
    with pytest.raises(UserError, match=rf"a whole process \({what}\)"):
        check_pair(a, b)
    check_pair(a, a)


def test_stacks_that_share_the_process_settings_may_take_turns():
    a = subject.subject(plain_config("model=tiny", "precision.tf32=true"))
    b = subject.subject(plain_config("model=tiny", "precision.tf32=true", "attention=sdpa", "fusion=projections"))
    check_pair(a, b)
    assert build.process_wide(config.stack(plain_config("model=tiny", "attention=sdpa"))) == {}


def test_variables_cannot_differ_either():
    with pytest.raises(UserError, match=r"\(PACED\)"):
        check_pair(*(subject.subject(paced(0.1, variable=value)) for value in ("1", "2")))


def child(tmp_path, given) -> subprocess.CompletedProcess[str]:
    source, target = tmp_path / "pair.json", tmp_path / "result.json"
    source.write_text(json.dumps(given))
    line = [sys.executable, "-m", "pi0exp.interleave", str(source), str(target)]
    return subprocess.run(line, cwd=REPOSITORY, env=environment(tmp_path), capture_output=True, text=True, timeout=120)


def test_command_refuses_half_a_pair(tmp_path):
    done = child(tmp_path, {"a": paced(0.1)})
    assert done.returncode == 2
    assert done.stderr == "pi0exp.interleave: b is None; it must hold settings\n"


def test_refusal_of_the_child_is_the_users_error(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}/tests")
    with pytest.raises(UserError, match="rounds is 3; an interval needs 10 or more"):
        measure_pair_isolated(paced(0.1), paced(0.1), 3, lambda text: None)


@pytest.mark.slow
def test_tiny_policies_take_turns():
    """Both verified, both timed, whole rounds: eager attention against SDPA of the tiny model."""
    words = (*QUICK, "workload.num_steps=1")
    told, start = [], time.perf_counter()
    result, found = measure_pair_isolated(
        plain_config(*words), plain_config(*words, "attention=sdpa"), ROUNDS, told.append
    )
    assert not any(name.startswith("wall_s/") for name in result.metrics)  # of both, not of B
    assert result.outcome is Outcome.OK, result
    assert len(found) == ROUNDS
    assert all(0 < time_ms < 1e3 * (time.perf_counter() - start) for pair in found for time_ms in pair)
    assert result.metrics["error/rel_l2"] != result.metrics["baseline/error/rel_l2"]
    assert "attention" in result.applied
    assert "baseline.attention" not in result.applied
    assert any(text.startswith("A: verify") for text in told)
    assert any(text.startswith("B: verify") for text in told)
