import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import stores

from pi0exp import backend
from pi0exp.errors import UserError
from pi0exp.result import Outcome, Result, record
from pi0exp.root import default_root
from pi0exp.track import Store, Stored

KEY = "0123456789abcdef"
STATUS = {"ok": "FINISHED", "unsupported": "FINISHED", "interrupted": "KILLED"}


def point(study: str, outcome: str = "ok", key: str = KEY, **changed) -> dict:
    ok = outcome == "ok"
    result = Result(
        Outcome(outcome),
        reasons=[] if ok else [f"it was {outcome}", "a second | reason"],
        numerics="bf16",
        applied={"attention": ["sdpa in 18 layers"]},
        metrics={"latency_ms/p50": 20.5, "power_w/mean": 400.0} if ok else {"error/rel_l2": 0.5},
        samples={"latency_ms": [20.0 + step / 1000 for step in range(1500)]} if ok else {},
        facts={"tokens": "stand-in"},
        fingerprint={"gpu": "NVIDIA H200", "arch": "sm90", "commit": "abc", "dirty": "false", "driver": {"major": 5}},
        log="" if ok else "Traceback …",
    )
    params = {"attention": "sdpa", "stack": "2_sdpa"}
    return record(key, study, params, {"workload": {"batch_size": 1}}, result) | changed


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store") / "a folder %41" / "mlruns"


@pytest.fixture(scope="module")
def store(root) -> Store:
    return Store.open(None, root)


@pytest.fixture(scope="module")
def client(store):
    return store._client


def measured(store: Store, one: dict) -> str:
    run_id = store.start(one["study"], "sdpa", one["key"], one["params"], {"gpu": "NVIDIA H200"})
    store.finish(run_id, one)
    return run_id


@pytest.mark.parametrize("outcome", ["ok", "unsupported", "error", "interrupted", "wrong_numerics", "oom"])
def test_every_outcome_is_logged_and_only_some_settle(store, client, study, outcome):
    one = point(study, outcome)
    assert store.settled(study, KEY) is None
    run_id = store.start(study, "sdpa", KEY, one["params"], {"gpu": "NVIDIA H200"})
    started = client.get_run(run_id)
    assert started.info.status == "RUNNING"
    assert started.info.run_name == "sdpa"
    assert started.data.params == one["params"]
    assert {"key": KEY, "study": study, "outcome": "running", "gpu": "NVIDIA H200"}.items() <= started.data.tags.items()
    assert store.settled(study, KEY) is None

    store.finish(run_id, one)
    run = client.get_run(run_id)
    assert run.info.status == STATUS.get(outcome, "FAILED")
    assert run.data.tags["outcome"] == outcome
    assert run.data.tags["reasons"] == "\n".join(one["reasons"])
    assert run.data.tags["facts.tokens"] == "stand-in"
    assert "2_sdpa" in run.data.tags["mlflow.note.content"]
    assert one["metrics"].items() <= run.data.metrics.items()
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {"experiment.json", "result.json"} | ({"plots", "tables"} if outcome == "ok" else {"log.txt"})
    expected = Stored(run_id, one) if Outcome(outcome).settled else None
    assert store.settled(study, KEY) == expected
    assert store.settled(study, "f" * 16) is None
    assert store.runs(study) == [Stored(run_id, one)]


def test_samples_are_a_metric_with_steps(store, client, study):
    one = point(study)
    history = client.get_metric_history(measured(store, one), "samples/latency_ms")
    assert [sample.value for sample in sorted(history, key=lambda sample: sample.step)] == one["samples"]["latency_ms"]


def test_files_of_options_are_artifacts(store, root, client, study):
    text = "Validator,PT_VERSION,2.11.0\nGemm,tn,Default,0.01\n"
    run_id = measured(store, point(study, files={"tunableop.csv": text}))
    assert [file.path for file in client.list_artifacts(run_id, "files")] == ["files/tunableop.csv"]
    assert (root / study / run_id / "artifacts" / "files" / "tunableop.csv").read_text() == text
    assert store.runs(study)[0].record["files"] == {"tunableop.csv": text}


def test_record_of_an_earlier_version_has_no_files(store, client, study):
    """In the store it is the same one as in its result file, where they are filled in."""
    one = point(study)
    run_id = measured(store, {name: value for name, value in one.items() if name != "files"})
    assert one["files"] == {}
    assert store.import_record(one) == (run_id, False)
    with pytest.raises(UserError, match="has another result"):
        store.import_record(one | {"files": {"a.csv": ""}})


def test_values_that_are_no_numbers_are_named_and_not_charted(store, client, study):
    one = point(study, "wrong_numerics", metrics={"error/rel_l2": float("nan"), "error/max": float("inf")})
    run_id = measured(store, one)
    run = client.get_run(run_id)
    assert run.data.metrics == {}
    assert run.data.tags["nonfinite"] == "error/rel_l2=nan, error/max=inf"
    [stored] = store.runs(study)
    assert json.dumps(stored.record) == json.dumps(one)
    assert store.import_record(one) == (run_id, False), "NaN must not make a record differ from itself"


def test_latest_settled_run_counts_and_only_with_its_record(store, root, study):
    first, second = point(study), point(study, facts={"tokens": "real"})
    first_id, second_id = measured(store, first), measured(store, second)
    measured(store, point(study, "error"))
    assert store.settled(study, KEY) == Stored(second_id, second)
    shutil.rmtree(root / study / second_id)
    assert store.settled(study, KEY) == Stored(first_id, first)
    shutil.rmtree(root / study / first_id)
    assert store.settled(study, KEY) is None


def test_torn_record_is_told(store, root, study):
    run_id = measured(store, point(study))
    (root / study / run_id / "artifacts" / "result.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=f"result.json of run {run_id} is torn"):
        store.settled(study, KEY)


def test_long_texts_are_cut_in_tags_and_whole_in_the_record(store, client, study):
    one = point(study, "error", reasons=["x" * 9000])
    run_id = measured(store, one)
    assert client.get_run(run_id).data.tags["reasons"] == "x" * 4000
    assert store.runs(study)[0].record == one


def test_import_is_done_once(store, client, study):
    one = point(study)
    run_id, created = store.import_record(one)
    assert created
    tags = client.get_run(run_id).data.tags
    assert {"imported": "true", "gpu": "NVIDIA H200", "arch": "sm90", "commit": "abc"}.items() <= tags.items()
    assert client.get_run(run_id).info.run_name == "2_sdpa"
    assert store.import_record(one) == (run_id, False)
    assert store.settled(study, KEY) == Stored(run_id, one)
    with pytest.raises(UserError, match=f"{KEY}: run {run_id} .* has another result"):
        store.import_record(point(study, "error"))
    assert len(store.runs(study)) == 1


def test_import_over_a_failed_run(store, study):
    measured(store, point(study, "error"))
    run_id, created = store.import_record(point(study))
    assert created
    assert store.settled(study, KEY) == Stored(run_id, point(study))


def test_import_that_fails_leaves_nothing(store, study):
    with pytest.raises(UserError, match="two%"):
        store.import_record(point(study, metrics={"latency_ms/p50": 1.0, "two%": 2.0}))
    assert store.runs(study) == []
    assert store.import_record(point(study))[1]


def test_study_that_cannot_be_written(store, client, root, study):
    (root / study).write_text("in the place of the folder")
    with pytest.raises(UserError, match=study):
        store.start(study, "sdpa", KEY, {}, {})
    with pytest.raises(UserError, match="study='a/b'"):
        store.start("a/b", "sdpa", KEY, {}, {})
    deleted = f"{study}_deleted"
    client.delete_experiment(client.create_experiment(deleted))
    with pytest.raises(UserError, match=f"experiment {deleted} was deleted"):
        store.start(deleted, "sdpa", KEY, {}, {})


def test_store_that_was_moved_is_told(store, root, tmp_path, study):
    measured(store, point(study))
    moved = tmp_path / "moved"
    moved.mkdir()
    with sqlite3.connect(root / "mlflow.db") as source, sqlite3.connect(moved / "mlflow.db") as target:
        source.backup(target)
    with pytest.raises(UserError, match="the store was moved"):
        Store.open(None, moved).start(study, "sdpa", KEY, {}, {})


def test_default_root_is_in_the_checkout():
    assert default_root() == Path(__file__).parent.parent / "mlruns"


def python(code: str, *arguments: object, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_import_is_light():
    child = python("import pi0exp.track, pi0exp.load, sys; print({'mlflow', 'torch', 'sqlalchemy'} & {*sys.modules})")
    assert child.communicate(timeout=60)[0] == "set()\n"


OPEN = """
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pi0exp.track import Store
store = Store.open(None, Path(sys.argv[1]))
print(store.start("together", sys.argv[2], sys.argv[2], {}, {}))
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
"""


@pytest.mark.slow
def test_processes_create_a_store_together_and_silently(tmp_path):
    children = [python(OPEN, tmp_path / "new", f"{number:016x}") for number in range(4)]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4, outputs
    assert [len(output.split()) for output in outputs] == [1] * 4, "only what the child printed itself"
    assert len(set(outputs)) == 4
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (4,)


def test_half_created_store_is_begun_again(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_create", stores.MADE_BY_MLFLOW)
    (tmp_path / ".mlflow.db.new").write_text("left by a process that was killed")
    Store.open(None, tmp_path)
    assert not (tmp_path / ".mlflow.db.new").exists()
    stores.copied(tmp_path / "copy.db", tmp_path)
    made, copied = (content(tmp_path / name) for name in ("mlflow.db", "copy.db"))
    assert len(made) > 100
    assert copied == made, "what the tests copy is what MLflow makes"


def content(file: Path) -> list[list[str]]:
    """All that a database holds: the words of each statement, without times. MLflow orders constraints at random."""
    with closing(sqlite3.connect(file)) as connection:
        return sorted(sorted(re.findall(r"\w+", re.sub(r"\b\d{13}\b", "time", one))) for one in connection.iterdump())


FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pi0exp.errors import UserError
from pi0exp.track import Store
try:
    Store.open(None, Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_no_room_is_found_out_at_once(tmp_path):
    child = python(FULL, tmp_path / "new")
    output = child.communicate(timeout=120)[0]
    assert str(tmp_path / "new") in output
    assert "File too large" in output
    assert output.count("\n") == 1


def refused(uri: str | None, root: Path | None, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        Store.open(uri, root)
    assert len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "mlruns").write_text("")
    refused(None, tmp_path / "mlruns", str(tmp_path / "mlruns"), "is a file where a folder must be")
    refused(None, tmp_path / "mlruns" / "below", str(tmp_path / "mlruns"), "Not a directory")


def test_foreign_files_in_place_of_the_database(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    refused(None, tmp_path, str(tmp_path / "mlflow.db"), "file is not a database")
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "mlflow.db").mkdir()
    refused(None, tmp_path, str(tmp_path / "mlflow.db"), "unable to open database file")


def test_database_of_somebody_else(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE experiments (name)")
    refused(None, tmp_path, str(tmp_path / "mlflow.db"), "no MLflow store", "alembic_version")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("experiments",)]


def test_database_that_may_only_be_read(store, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow takes such a URI for a path and makes its folder
    with sqlite3.connect(root / "mlflow.db") as source, sqlite3.connect(tmp_path / "x.db") as target:
        source.backup(target)
    refused(f"sqlite:///file:{tmp_path}/x.db?mode=ro&uri=true", None, f"{tmp_path}/x.db", "readonly")
    assert Store.open(f"sqlite:///file:{tmp_path}/x.db?mode=rw&uri=true").runs("none") == []


def test_database_that_others_hold(store, root, monkeypatch):
    monkeypatch.setattr(backend, "BUSY_S", 0.1)
    with sqlite3.connect(root / "mlflow.db", isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            refused(None, root, "mlflow.db", "locked")
        finally:
            connection.execute("ROLLBACK")
    assert Store.open(None, root)


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("file:///tmp/mlruns", "no longer keeps runs in plain files"),
        ("mlruns", "no tracking URI"),
        ("http://127.0.0.1:9", "127.0.0.1:9"),
        ("nonsense://host/x", "nonsense"),
    ],
)
def test_uri_that_is_no_store(uri, part):
    refused(uri, None, part)


def test_tracking_server_that_answers_with_an_error_is_left_to_mlflow():
    """Reachable is whoever answers; what the answer means is for MLflow to say."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403, "go away")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            refused(f"http://user:secret@127.0.0.1:{server.server_port}", None, "http://user:***@127.0.0.1", "403")
        finally:
            server.shutdown()


def test_uri_of_a_sqlite_file(root, store, tmp_path, study):
    """Another file and another root; the files of runs go below the root."""
    (tmp_path / "db").mkdir()
    with sqlite3.connect(root / "mlflow.db") as source, sqlite3.connect(tmp_path / "db" / "x.db") as target:
        source.backup(target)
    other = Store.open(f"sqlite:///{tmp_path}/db/x.db", tmp_path / "files")
    run_id = measured(other, point(study))
    assert (tmp_path / "files" / study / run_id / "artifacts" / "result.json").is_file()
    beside = Store.open(f"sqlite:///{tmp_path}/db/x.db")
    assert beside.settled(study, KEY) == Stored(run_id, point(study))
    with pytest.raises(UserError, match=r"a\.db"):
        Store.open(f"sqlite:///{tmp_path}/db/x.db/a.db")
