"""Result files beside the store: what is settled in one is not measured again, and no failure is written over it."""

import pytest

from pi0exp import compose, point
from pi0exp.explain import explain_point
from pi0exp.load import read_record
from pi0exp.result import Outcome, Result
from pi0exp.track import Store

OK = Result(Outcome.OK, metrics={"latency_ms/p50": 20.0}, samples={"latency_ms": [20.0]}, fingerprint={"gpu": "CPU"})
LATE = Result(Outcome.TIMEOUT, ["no result in time"], fingerprint={"gpu": "CPU"})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Measure the point with a store of this name, as if it ended so; what the closing table needs."""
    monkeypatch.setattr(point, "card", lambda *given: "")

    def measured(store: str, ended: Result | None, *words: str) -> dict:
        def child(*given, **more):
            assert ended is not None, "it is measured"
            return ended

        monkeypatch.setattr(point, "measure_isolated", child)
        track = (f"track.root={tmp_path / store}", f"track.results={tmp_path / 'results'}")
        words = ("model=tiny", "measure=quick", "measure.device=cpu", *track, *words)
        return point.measure_point(compose.from_words(words))

    return measured


@pytest.fixture
def file(run, tmp_path):
    """The only result file, which is ok."""
    run("first", OK)
    [path] = (tmp_path / "results").glob("*/*/*.json")
    return path


@pytest.mark.parametrize("store", ["first", "fresh"])
def test_failure_is_not_written_over_what_is_settled(run, file, capsys, store):
    before = file.read_bytes()
    again = run(store, LATE, "resume=false")
    assert again["outcome"] == "timeout"
    assert file.read_bytes() == before
    [told] = [line for line in capsys.readouterr().err.splitlines() if str(file) in line]
    assert told == f"pi0exp: {file} stays, which is ok; this timeout is in the store only, as run {again['run_id']}"
    assert run(store, None)["outcome"] == "ok", "of the store, or of the file"


def test_failure_has_a_file_where_nothing_is_settled(run, tmp_path):
    run("first", LATE)
    [path] = (tmp_path / "results").glob("*/*/*.json")
    assert read_record(path)["outcome"] == "timeout"
    run("first", OK)
    assert read_record(path)["outcome"] == "ok"
    run("first", Result(Outcome.OK, metrics={"latency_ms/p50": 10.0}, fingerprint={"gpu": "CPU"}), "resume=false")
    assert read_record(path)["metrics"] == {"latency_ms/p50": 10.0}


def test_what_a_file_has_settled_comes_into_the_store(run, file, tmp_path, capsys):
    before, key = file.read_bytes(), file.stem
    made = run("fresh", None)
    assert (made["outcome"], made["metrics"]) == ("ok", {"latency_ms/p50": 20.0})
    assert f"pi0exp: {file} was brought into the store" in capsys.readouterr().err
    stored = Store.open(root=tmp_path / "fresh").settled("adhoc", key)
    assert (stored.run_id, stored.record) == (made["run_id"], read_record(file))
    assert run("fresh", None)["run_id"] == made["run_id"]
    assert file.read_bytes() == before


def test_settled_beside_a_failure_in_the_store(run, file, tmp_path):
    record = read_record(file) | {"outcome": "oom", "reasons": ["full"], "metrics": {}, "samples": {}}
    Store.open(root=tmp_path / "other").import_record(record)
    assert run("other", None)["outcome"] == "ok"


def test_torn_file_is_measured_again(run, file, capsys):
    file.write_text("{")
    assert run("fresh", LATE)["outcome"] == "timeout"
    assert f"left out: {file}: " in capsys.readouterr().err
    assert read_record(file)["outcome"] == "timeout"


def test_explained_as_it_would_be_done(file, tmp_path):
    words = ("model=tiny", "measure=explain", "measure.device=cpu", f"track.root={tmp_path / 'fresh'}")
    for more, count in (((), 0), ((f"track.results={tmp_path / 'results'}",), 1)):
        assert len(explain_point(compose.from_words((*words, *more)))["explained"]["settled"]) == count
