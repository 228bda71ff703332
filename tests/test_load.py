import gzip
import json
import subprocess
import sys

import pytest

from pi0exp import load
from pi0exp.errors import UserError
from pi0exp.load import main, read_record, write_record
from pi0exp.result import Outcome, Result, record
from pi0exp.track import Store

KEY = "00112233445566aa"


def point(
    outcome: str = "ok", study: str = "ladder", key: str = KEY, samples: int = 3, gpu: str = "NVIDIA H200"
) -> dict:
    ok = outcome == "ok"
    result = Result(
        Outcome(outcome),
        reasons=[] if ok else ["it was so"],
        metrics={"latency_ms/p50": 20.5} if ok else {"error/rel_l2": float("nan")},
        samples={"latency_ms": [1 / (step + 3) for step in range(samples)]} if ok else {},
        applied={"attention": ["18 layers"]},
        files={"tunableop.csv": "Validator,A,1\n"} if ok else {},
        fingerprint={"gpu": gpu, "driver": {"version": 5}} if gpu else {},
    )
    return record(key, study, {"attention": "sdpa"}, {"attention": {"_target_": "x"}}, result)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    Store.open(None, root)
    return root


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pi0exp.load", *map(str, arguments)]
    return subprocess.run(line, text=True, capture_output=True, timeout=120, check=False)


def test_small_files_are_plain_and_large_ones_compressed(tmp_path):
    small = write_record(point(), tmp_path)
    assert small == tmp_path / "ladder" / "nvidia-h200" / f"{KEY}.json"
    assert json.loads(small.read_text()) == point()
    assert read_record(small) == point()
    assert point()["files"], "a file of an option is carried along"
    large = write_record(point(samples=60_000), tmp_path)
    assert large == small.with_suffix(".json.gz")
    assert read_record(large) == point(samples=60_000)
    assert list(small.parent.iterdir()) == [large], "no older result of the same key, nothing temporary"
    before = large.read_bytes()
    assert write_record(point(samples=60_000), tmp_path).read_bytes() == before
    assert write_record(point(gpu=""), tmp_path).parent.name == "cpu"
    assert write_record(point(gpu=" AMD Instinct™ MI350X (VF) "), tmp_path).parent.name == "amd-instinct-mi350x-vf"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "ladder").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/ladder/nvidia-h200/{KEY}.json: "):
        write_record(point(), tmp_path)


def test_round_trip_and_once_only(tmp_path, root, capsys, monkeypatch):
    monkeypatch.setattr(load, "PLAIN_BYTES", 20_000)  # MLflow takes 10 s for the samples of a file of a megabyte
    points = [
        point(study="trip"),
        point("wrong_numerics", "trip", "f" * 16),
        point("unsupported", "trip", "e" * 16, gpu="AMD MI350X"),
        point(study="trip", key="d" * 16, samples=1_500),
    ]
    files = [write_record(one, tmp_path) for one in points]
    assert [file.suffix for file in files] == [".json", ".json", ".json", ".gz"]
    assert main([str(tmp_path), "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 5
    assert all(f"loaded: {file} (trip, " in out for file in files)
    assert out.endswith("4 files: 4 loaded, 0 already there\n")

    store = Store.open(None, root)
    for one in (points[0], points[2], points[3]):
        stored = store.settled("trip", one["key"])
        assert json.dumps(stored.record) == json.dumps(one), "as text: NaN differs from itself"
    assert store.settled("trip", "f" * 16) is None
    assert len(store.runs("trip")) == 4

    assert main([str(files[0]), str(tmp_path / "trip"), "--uri", f"sqlite:///{root}/mlflow.db"]) == 0
    assert capsys.readouterr().out.endswith("4 files: 0 loaded, 4 already there\n")
    assert len(store.runs("trip")) == 4


def test_other_result_under_the_same_key(tmp_path, root, capsys):
    main([str(write_record(point(study="other"), tmp_path / "a")), "--root", str(root)])
    ahead = write_record(point(study="other", key="0" * 16), tmp_path / "b")
    other = write_record(point(study="other", samples=5), tmp_path / "b")
    assert main([str(ahead), str(other), "--root", str(root)]) == 2
    assert f"pi0exp: {other}: other/{KEY}: run " in capsys.readouterr().err
    both = [write_record(point(study="other", key="1" * 16, samples=n), tmp_path / f"{n}") for n in (5, 6)]
    assert main([*map(str, both), "--root", str(root)]) == 2
    assert f"pi0exp: {both[1]}: another result under the key of {both[0]}" in capsys.readouterr().err
    assert len(Store.open(None, root).runs("other")) == 1, "nothing is loaded before everything is checked"


def test_each_file_goes_in_by_itself(tmp_path, root, capsys):
    """Beside one that is torn, and one of a point that the store has settled otherwise."""
    store = Store.open(None, root)
    store.import_record(point(study="each", samples=5))
    store.import_record(point("timeout", study="each", key="1" * 16))
    for one in (point(study="each"), point(study="each", key="1" * 16), point("error", study="each", key="2" * 16)):
        write_record(one, tmp_path)
    torn = tmp_path / "each" / "nvidia-h200" / f"{'0' * 16}.json"
    torn.write_text("{")
    assert main([str(tmp_path), "--each", "--root", str(root)]) == 0
    out, err = capsys.readouterr()
    assert out == "3 files: 2 loaded, 1 already there\n"
    assert err.startswith(f"left out: {torn}: ")
    assert err.count("\n") == 1
    assert store.settled("each", KEY).record == point(study="each", samples=5)
    assert store.settled("each", "1" * 16).record == point(study="each", key="1" * 16)
    write_record(point("oom", study="each", key="2" * 16), tmp_path)
    assert main([str(tmp_path), "--each", "--root", str(root)]) == 0
    assert "has another result" in capsys.readouterr().err


def broken(**changed: object) -> str:
    return json.dumps({name: value for name, value in (point() | changed).items() if value is not ...})


BROKEN = {
    "torn": (broken()[:100], "not a whole result file: Unterminated"),
    "empty": ("", "the file is empty"),
    "list": ("[]", "no JSON object with format 1"),
    "foreign": ('{"name": "something else"}', "no JSON object with format 1"),
    "deep": ("[" * 100_000, "recursion"),
    "newer": (broken(format=2), "no JSON object with format 1"),
    "missing": (broken(key=..., samples=...), "key, samples missing"),
    "unknown": (broken(more=1), "unknown field more"),
    "key": (broken(key="../../etc"), 'key is not what a result holds there: "../../etc"'),
    "study": (broken(study="../up"), "study is not"),
    "outcome": (broken(outcome="fine"), "outcome='fine'"),
    "experiment": (broken(experiment=[]), "experiment is not"),
    "params": (broken(params={"batch": 1}), "params is not"),
    "metrics": (broken(metrics={"latency_ms/p50": "fast"}), "metrics is not"),
    "boolean": (broken(metrics={"latency_ms/p50": True}), "metrics is not"),
    "huge": (broken(metrics={"latency_ms/p50": 10**400}), "metrics is not"),
    "samples": (broken(samples={"latency_ms": 1.0}), "samples is not"),
    "reasons": (broken(reasons="why"), "reasons is not"),
    "applied": (broken(applied={"attention": "18"}), "applied is not"),
    "files": (broken(files={"table.csv": 3}), "files is not"),
    "folder": (broken(files={"../../table.csv": "text"}), "files is not"),
    "log": (broken(log=None), "log is not"),
    "untimed": (broken(metrics={}), "must carry latency_ms/p50"),
    "timed": (broken(outcome="error", reasons=["x"], samples={}), "must not carry latency_ms/p50"),
    "silent": (broken(outcome="error", metrics={}, samples={}), "must say why"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_no_result(name, tmp_path):
    text, cause = BROKEN[name]
    path = tmp_path / f"{name}.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_record(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert cause in message
    assert "\n" not in message


def test_bytes_that_are_no_text_or_not_compressed(tmp_path):
    whole = gzip.compress(broken().encode())
    for name, content in {
        "a.json": b"\xff\xfe\x00",
        "b.json": whole,
        "c.json.gz": broken().encode(),
        "d.json.gz": whole[:-20],
        "e.json.gz": whole[:20] + b"\0\0\0\0" + whole[24:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_record(tmp_path / name)


def test_what_a_result_need_not_have_is_filled_in(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(broken(log=..., facts=..., numerics=..., reasons=..., applied=..., files=...))
    assert read_record(path) == point() | {"applied": {}, "files": {}}


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    good = write_record(point(), tmp_path / "good")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "none").mkdir()
    for path, cause in {
        tmp_path / "torn.json": "Expecting property name",
        tmp_path / "missing.json": "No such file or directory",
        tmp_path / "none": "no result file",
    }.items():
        done = command(good, path, "--root", tmp_path / "store")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"pi0exp: {path}: ")
        assert cause in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists(), "files are checked before a store is opened"


def test_command_and_its_help(tmp_path, root):
    done = command(write_record(point(study="command"), tmp_path), "--root", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 file: 1 loaded, 0 already there\n")
    refused = command(tmp_path, "--root", write_record(point(), tmp_path))
    assert refused.returncode == 2
    assert "is a file where a folder must be" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_words_that_load_nothing(capsys, words, code):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == code
    assert ("example: python -m pi0exp.load" in capsys.readouterr().out) == (words == ["--help"])
