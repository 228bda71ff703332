"""Two measurements side by side: what is found, what is claimed, what is refused."""

import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from made_records import keep, made, refusal, store
from scipy import stats

from pi0exp import compare, comparison, interleave, intervals
from pi0exp.errors import UserError
from pi0exp.interleave import measure_pair, pairs
from pi0exp.known import Known
from pi0exp.load import write_record
from pi0exp.operands import Asked, Operands, Point, name_of, points
from pi0exp.result import Outcome, Result, record

SLOW = (10.0, 10.3)
"""p50 of A and of B, 3 % apart; samples scatter by 0.3 %."""


@pytest.fixture(autouse=True)
def no_store(monkeypatch, tmp_path):
    """No store but the one that a test names, and no committed results."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pi0exp.operands.default_root", lambda: tmp_path / "none")
    monkeypatch.setattr("pi0exp.known.default_root", lambda: tmp_path / "none")


def files(folder: Path, p50_ms: float, first: int, count: int = 3, words=(), **more) -> str:
    """`count` processes of one point, joined as on the command line."""
    spread = np.random.default_rng(first).normal(1, 0.001, count)
    kept = [
        keep(folder / str(first + i), *words, p50_ms=p50_ms * spread[i], seed=first + i, **more) for i in range(count)
    ]
    return ",".join(map(str, kept))


def run(capsys, *words) -> tuple[int, str, str]:
    code = compare.main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys, *words) -> dict:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *words) -> str:
    return refusal(capsys, compare.main, *words)


def rows(found: dict) -> dict[str, dict]:
    return {row["name"]: row for row in found["rows"]}


# ---- what is shown and claimed


def test_configuration_first_then_metrics_then_the_verdict(capsys, tmp_path):
    a, b = keep(tmp_path / "a"), keep(tmp_path / "b", "attention=sdpa", p50_ms=9.0, commit="fedcba")
    code, out, _ = run(capsys, a, b)
    assert code == 0
    places = [out.index(text) for text in ("differs", "latency_ms/p50", "outcome", "fidelity", "verdict  no claim")]
    assert places == sorted(places)
    assert re.search(r"^attention +eager +sdpa *$", out, re.MULTILINE)
    assert re.search(r"^machine.commit +abcdef +fedcba *$", out, re.MULTILINE)
    assert "REORDERED rel L2 4.00e-03 (plain 7.00e-03)" in out


def test_one_process_each_shows_intervals_and_claims_nothing(capsys, tmp_path):
    a, b = (keep(tmp_path / side, p50_ms=p50, seed=i) for i, (side, p50) in enumerate(zip("ab", SLOW, strict=True)))
    [found] = as_json(capsys, a, b)["points"]
    assert found["verdict"] == "no claim"
    assert found["text"].startswith("no claim across processes: 1 of A and 1 of B, 3 each are needed")
    row = rows(found)["latency_ms/p50"]
    assert row["verdict"] == "no claim (samples: slower)"
    assert 1.02 < row["interval"]["low"] < row["interval"]["ratio"] < row["interval"]["high"] < 1.04
    rate = rows(found)["throughput_hz"]
    assert rate["verdict"] == "no claim (samples: slower)"
    assert rate["interval"]["ratio"] == pytest.approx(1 / row["interval"]["ratio"])
    assert rate["interval"]["low"] == pytest.approx(1 / row["interval"]["high"])


def test_three_processes_each_are_told_apart(capsys, tmp_path):
    a, b = files(tmp_path / "a", SLOW[0], 0), files(tmp_path / "b", SLOW[1], 10)
    [found] = as_json(capsys, a, b)["points"]
    assert found["verdict"] == "slower"
    assert re.match(r"B is slower: latency_ms/p50 .* ratio 1\.0[23]\d+ \[.*\], 3 and 3 processes$", found["text"])
    [found] = as_json(capsys, b, a)["points"]
    assert found["verdict"] == "faster"
    assert rows(found)["throughput_hz"]["verdict"] == "faster"
    [found] = as_json(capsys, a, b, "--margin", "0.05")["points"]
    assert found["verdict"] == "no difference seen"


def test_two_processes_of_one_side_are_too_few(capsys, tmp_path):
    a, b = files(tmp_path / "a", 10.0, 0), files(tmp_path / "b", 20.0, 10, count=2)
    [found] = as_json(capsys, a, b)["points"]
    assert found["verdict"] == "no claim"
    assert "3 of A and 2 of B" in found["text"]


def point(p50s_ms: list[float], first: int) -> Point:
    known = [Known(f"{first + i}", made(p50_ms=p50, seed=first + i)) for i, p50 in enumerate(p50s_ms)]
    return Point(tuple(known))


def test_false_alarms_across_processes_are_rarer_than_stated():
    """Processes of one stack scatter by 1 %, far more than their samples do."""
    random, count, looked = np.random.default_rng(0), 100, 20
    verdicts, by_samples = [], 0
    for i in range(count):
        a, b = (point(list(10 * np.exp(0.01 * random.standard_normal(3))), 10 * i + 5 * side) for side in (0, 1))
        verdicts.append(comparison.compare(a, b).verdict)
        if i < looked:
            one = intervals.of_samples(*(side.record["samples"]["latency_ms"] for side in (a, b)))
            by_samples += intervals.word(one) != intervals.NOTHING
    wrong = sum(verdict != intervals.NOTHING for verdict in verdicts)
    assert wrong <= stats.binom.ppf(0.999, count, 1 - intervals.CONFIDENCE)
    assert by_samples > looked / 3  # what one process each would have claimed


def test_words_for_what_is_no_time(capsys, tmp_path):
    numbers = ({"power_w/mean": 500.0, "perf_per_watt": 0.2, "graphs/evictions": 0.0, "sampling/drift_share": -0.1},)
    numbers += ({"power_w/mean": 600.0, "perf_per_watt": 0.1, "graphs/evictions": 0.0, "sampling/drift_share": 0.1},)
    a, b = (
        files(tmp_path / str(i), 10.0, 10 * i, metrics=more | {"latency_ms/p50_ci_share": 0.1 + i}, error=0.004 + i)
        for i, more in enumerate(numbers)
    )
    [found] = as_json(capsys, a, b)["points"]
    verdicts = {name: row["verdict"] for name, row in rows(found).items()}
    assert verdicts["power_w/mean"] == verdicts["error/rel_l2"] == verdicts["latency_ms/p50_ci_share"] == "higher"
    assert verdicts["perf_per_watt"] == "lower"
    for name in ("graphs/evictions", "sampling/drift_share"):
        assert (verdicts[name], rows(found)[name]["interval"]) == ("", None)


def test_a_failure_has_no_latency_to_compare(capsys, tmp_path):
    a = files(tmp_path / "a", 10.0, 0)
    b = keep(tmp_path / "b", outcome=Outcome.WRONG_NUMERICS, reasons=("observation 3 is too far",), error=9.0)
    [found] = as_json(capsys, a, b)["points"]
    assert found["text"] == "no claim: B has no latency, see the outcome"
    assert found["outcomes"] == ["ok", "wrong_numerics: observation 3 is too far"]
    assert rows(found)["latency_ms/p50"]["b"] is None


def test_other_work_is_named(capsys, tmp_path):
    a, b = files(tmp_path / "a", 10.0, 0), files(tmp_path / "b", 12.0, 10, words=("workload=masked",))
    [found] = as_json(capsys, a, b)["points"]
    assert found["text"].endswith("3 and 3 processes; of other work: workload")


def test_a_measurement_is_not_compared_with_itself(capsys, tmp_path):
    a = files(tmp_path / "a", 10.0, 0)
    [found] = as_json(capsys, a, a)["points"]
    assert found["verdict"] == "no claim"
    assert "3 of the measurements is A's and B's" in found["text"]


# ---- what a name means


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ([{"key": "b" * 16}], "2 different points"),
        ([{}], "the same measurement twice"),
        ([{"outcome": Outcome.ERROR, "reasons": ("it broke",)}], "some of them are not ok"),
    ],
)
def test_what_commas_join_is_one_point(capsys, tmp_path, others, what):
    same = [] if others == [{}] else [7]
    kept = [keep(tmp_path / "0")]
    kept += [keep(tmp_path / str(i + 1), **({"seed": 7} if same else {}), **more) for i, more in enumerate(others)]
    assert what in refused(capsys, ",".join(map(str, kept)), kept[0])


def test_studies_are_compared_point_by_point(capsys, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, scale in ((before, 1.0), (after, 1.1)):
        keep(folder, p50_ms=10 * scale, key="a" * 16)
        keep(folder, "attention=sdpa", "measure=quick", p50_ms=8 * scale, key="b" * 16, seed=int(10 * scale))
    keep(before, "fusion=projections", key="c" * 16)
    keep(after, "precision=fp32", key="d" * 16)
    code, out, _ = run(capsys, before, after)
    assert code == 0
    assert re.search(r"^only in .*before: tiny default .*fusion=projections", out, re.MULTILINE)
    assert re.search(r"^only in .*after: tiny default .*precision=fp32", out, re.MULTILINE)
    assert len(re.findall(r"^no claim +1\.\d+ \[.*\] +tiny", out, re.MULTILINE)) == 2  # the closing table
    found = as_json(capsys, before, after)
    assert [round(rows(one)["latency_ms/p50"]["interval"]["ratio"], 2) for one in found["points"]] == [1.1, 1.1]


def test_each_gpu_of_a_study_with_its_like(capsys, tmp_path):
    for folder, scale in ((tmp_path / "before", 1.0), (tmp_path / "after", 1.1)):
        keep(folder, p50_ms=10 * scale, gpu="One GPU", key="a" * 16)
        keep(folder, p50_ms=30 * scale, gpu="Other GPU", key="b" * 16)
    found = as_json(capsys, tmp_path / "before", tmp_path / "after")["points"]
    assert sorted(round(rows(one)["latency_ms/p50"]["interval"]["ratio"], 2) for one in found) == [1.1, 1.1]
    across = as_json(capsys, tmp_path / "before/toy/one-gpu", tmp_path / "after/toy/other-gpu")["points"]
    assert [round(rows(one)["latency_ms/p50"]["interval"]["ratio"], 1) for one in across] == [3.3]


def test_the_latest_of_a_point_counts_and_a_tie_is_refused():
    old, new = made(key="a" * 16, date="2026-01-01"), made(key="b" * 16, seed=1, date="2026-01-02")
    [found] = points([Known("old", old), Known("new", new)], ordered=False)
    assert found.where == ["new"]
    tie = [Known("one", made(key="a" * 16)), Known("two", made(key="b" * 16, seed=1))]
    with pytest.raises(UserError, match="one and two: one point, measured on one day under two keys"):
        points(tie, ordered=False)
    assert [one.where for one in points(tie)] == [["one"]]
    for one, time in zip(tie, ("08:00:00", "09:00:00"), strict=True):
        one.record["fingerprint"]["time"] = f"2026-01-02T{time}+00:00"
    assert [one.where for one in points(tie, ordered=False)] == [["two"]]


def test_copies_of_a_measurement_count_once():
    one = made()
    [found] = points([Known("here", one), Known("there", dict(one)), Known("another", made(seed=1))])
    assert found.where == ["here", "another"]


def test_what_cannot_be_found_or_read(capsys, tmp_path):
    good, torn, foreign = keep(tmp_path / "a"), tmp_path / "torn.json", tmp_path / "foreign.json"
    torn.write_text('{"format": 1, ')
    foreign.write_text('{"traceEvents": []}')
    binary, empty = tmp_path / "binary.json", tmp_path / "empty"
    binary.write_bytes(b"\x1f\x8b\xff\xfe")
    empty.mkdir()
    assert "no result file, no stack, and no run or study" in refused(capsys, good, tmp_path / "missing.json")
    assert str(torn) in refused(capsys, good, torn)
    assert "not a result file" in refused(capsys, foreign, good)
    assert str(binary) in refused(capsys, binary, good)
    assert "no result file" in refused(capsys, good, empty)
    assert "is a point and" in refused(capsys, good, tmp_path / "a")
    other = keep(tmp_path / "b", "attention=sdpa").parent
    assert "have no point in common" in refused(capsys, good.parent, other)
    assert "no such stack" in refused(capsys, good, "stack=fastest")
    assert "not measured on this machine" in refused(capsys, "0_eager", good, "measure.device=cpu")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("workload=masked",), "workload=masked: goes with named stacks, and neither A nor B is one"),
        (("--rounds", "20"), "--rounds 20: it goes with --rerun and is 10 or more"),
        (("--rerun", "--rounds", "5"), "--rounds 5: it goes with --rerun and is 10 or more"),
        (("--margin", "-0.1"), "--margin -0.1: a share, 0 or more and below 1"),
        (("--margin", "nan"), "--margin nan: a share, 0 or more and below 1"),
    ],
)
def test_words_that_would_do_nothing_are_refused(capsys, tmp_path, words, what):
    file = keep(tmp_path)
    assert refused(capsys, file, file, *words) == what


def test_names_of_a_store(capsys, tmp_path):
    eager = [made("stack=0_eager", p50_ms=10 + 0.01 * i, seed=i) for i in range(3)]
    fused = [made("attention=sdpa", p50_ms=8 + 0.01 * i, seed=5 + i, study="other", key="b" * 16) for i in range(3)]
    ids = store(tmp_path, *eager, *fused)
    root, words = ("--root", tmp_path), ("model=tiny", "measure.device=cpu")
    [found] = as_json(capsys, ids[0], ids[3], *root)["points"]
    assert found["where"] == [[f"run {ids[0]}"], [f"run {ids[3]}"]]
    [found] = as_json(capsys, ",".join(ids[:3]), ",".join(ids[3:]), *root)["points"]
    assert found["verdict"] == "faster"
    [found] = as_json(capsys, "0_eager", ",".join(ids[3:]), *words, *root)["points"]
    assert (found["verdict"], len(found["where"][0])) == ("faster", 3)
    assert "have no point in common" in refused(capsys, "toy", "study=other", *root)
    assert "no finished run of this id" in refused(capsys, "0" * 32, ids[0], *root)
    assert "(other, toy)" in refused(capsys, "nothing", ids[0], *root).replace("Default, ", "")


# ---- taking turns


def paced(ms: float, **more: str) -> dict:
    measure = {"device": "cpu", "warmup_calls": 2, "warmup_s": 0.0, "warmup_max_s": 0.0}
    return {"subject": {"_target_": "paced_subject.Paced", "ms": ms, **more}, "measure": measure}


def paced_file(folder: Path, ms: float, **more: str) -> Path:
    result = Result(Outcome.ERROR, ["it broke then"], fingerprint={"gpu": "CPU"})
    return write_record(record("c" * 16, "paced", {"subject.ms": str(ms)}, paced(ms, **more), result), folder)


@pytest.fixture
def in_this_process(monkeypatch):
    """The pair is measured here, without a child."""

    def measured(a, b, rounds, told):
        with redirect_stdout(sys.stderr):  # where a child's words go
            result = measure_pair({"a": a, "b": b, "rounds": rounds})
        if result.outcome is not Outcome.OK:
            return result, []
        return result, pairs(result.samples["baseline_latency_ms"], result.samples["latency_ms"], 8)

    monkeypatch.setattr(interleave, "measure_pair_isolated", measured)


@pytest.mark.usefixtures("in_this_process")
def test_rerun_measures_both_and_decides(capsys, tmp_path):
    a, b = paced_file(tmp_path / "a", 0.3), paced_file(tmp_path / "b", 0.4)
    [found] = as_json(capsys, a, b, "--rerun", "--rounds", "30")["points"]
    assert found["verdict"] == "slower"
    assert re.search(r"30 rounds A B B A in one process; of other work: subject$", found["text"])
    assert ["subject.ms", "0.3", "0.4"] in found["differences"]
    assert len(found["samples"]["latency_ms"]) == len(found["samples"]["baseline_latency_ms"]) == 30 * 2 * 8
    assert found["fidelity"] == ["EXACT rel L2 1.00e-02 ()", "EXACT rel L2 1.00e-02 ()"]
    row = rows(found)["latency_ms/p90"]
    assert row["interval"]["low"] < row["interval"]["ratio"] < row["interval"]["high"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("more", "outcomes"),
    [
        (({}, {"wrong": "it is another"}), ["no result", "wrong_numerics: it is another"]),
        (({"wrong": "it is another"}, {}), ["wrong_numerics: it is another", "no result"]),
        (({}, {"changes": "yes"}), ["no result", "wrong_numerics: after it was timed: it changed meanwhile"]),
    ],
)
def test_rerun_says_which_side_failed(capsys, tmp_path, more, outcomes):
    a, b = (paced_file(tmp_path / side, 0.1, **one) for side, one in zip("ab", more, strict=True))
    code, out, _ = run(capsys, a, b, "--rerun", "--rounds", "10", "--json")
    assert code == 4
    [found] = json.loads(out)["points"]
    assert found["outcomes"] == outcomes
    assert found["text"].startswith("no claim: the rerun ended as wrong_numerics")
    assert not any(row["name"].startswith("latency") for row in found["rows"])


def test_rerun_of_a_study_is_refused(capsys, tmp_path):
    keep(tmp_path / "a")
    assert "--rerun measures two points" in refused(capsys, tmp_path / "a", tmp_path / "a", "--rerun")


def test_asked_is_the_stack_of_today(tmp_path):
    asked = Operands(None, tmp_path, ("model=tiny", "workload=masked")).asked("stack=8_compiled")
    assert asked.name == "tiny masked 8_compiled" == name_of(asked.params)
    assert asked.numerics == "REORDERED"


def test_rows_of_a_rerun_by_rounds():
    """p90 by whole rounds; what only one side has is shown, what is of both together is not."""
    random = np.random.default_rng(3)
    a, b = (scale * np.exp(0.003 * random.standard_normal((20, 16))) for scale in (10.0, 10.5))
    metrics = {"latency_ms/p50": 10.5, "latency_ms/p90": 10.54, "baseline/latency_ms/p50": 10.0, "memory_mb/peak": 1.0}
    metrics |= {"baseline/latency_ms/p90": 10.04, "warmup/calls": 3.0}
    samples = {"latency_ms": b.ravel().tolist(), "baseline_latency_ms": a.ravel().tolist()}
    result = Result(Outcome.OK, metrics=metrics, samples=samples)
    asked = [Asked(name, {}, {}, "EXACT") for name in "AB"]
    found = comparison.interleaved(*asked, result, pairs(a.ravel().tolist(), b.ravel().tolist(), 8))
    by_name = {row.name: row for row in found.rows}
    assert by_name["latency_ms/p90"].verdict == by_name["latency_ms/p50"].verdict == found.verdict == "slower"
    assert by_name["latency_ms/p90"].interval.low > 1.03
    assert by_name["warmup/calls"].a is None
    assert "memory_mb/peak" not in by_name


@pytest.mark.slow
def test_rerun_in_a_child(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    a, b = paced_file(tmp_path / "a", 0.3), paced_file(tmp_path / "b", 0.4)
    code, out, err = run(capsys, a, b, "--rerun", "--rounds", "30")
    assert code == 0, err
    assert "verdict  B is slower" in out
    assert "A B B A, 30 rounds of 8 calls a block" in err
