"""A study as a table for other tools: every run and every number, as csv, parquet and json."""

import csv
import io
import json
import math

import pytest
from made_records import made, refusal, store

from pi0exp import export
from pi0exp.result import Outcome

FAILED = {"outcome": Outcome.WRONG_NUMERICS, "reasons": ("too far", 'and "more",\nlines'), "key": "b" * 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A study of three runs: one ok, one that failed with an error that is no number, one with a metric of its own."""
    folder = tmp_path_factory.mktemp("store")
    records = [
        made("stack=0_eager", p50_ms=10.0),
        made("attention=sdpa", error=math.nan, metrics={"error/max_abs": math.inf}, **FAILED),
        made("workload=masked", p50_ms=8.0, key="c" * 16, metrics={"power_w/mean": 500.0}),
        made(study="other"),
    ]
    return folder, records, store(folder, *records)


def text(capfdbinary, root, *words) -> bytes:
    assert export.main(["toy", "--root", str(root[0]), *map(str, words)]) == 0
    return capfdbinary.readouterr().out


def refused(capsys, *words) -> str:
    return refusal(capsys, export.main, *words)


def test_csv_has_every_run_in_order_and_every_number(capfdbinary, root):
    rows = list(csv.DictReader(io.StringIO(text(capfdbinary, root, "--format", "csv").decode())))
    _, records, ids = root
    assert [row["run_id"] for row in rows] == ids[:3]
    assert [row["outcome"] for row in rows] == ["ok", "wrong_numerics", "ok"]
    assert rows[1]["reasons"] == 'too far\nand "more",\nlines'
    for row, one in zip(rows, records, strict=False):
        assert row["params.model"] == "tiny"
        assert row["machine.gpu"] == "CPU"
        assert row["machine.versions.torch"] == "2.11.0"
        found = {name: float(value) for name, value in row.items() if name.startswith("metrics.") and value}
        expected = {f"metrics.{name}": value for name, value in one["metrics"].items()}
        assert found == pytest.approx(expected, nan_ok=True, rel=0, abs=0)
    assert (rows[0]["metrics.power_w/mean"], rows[2]["metrics.power_w/mean"]) == ("", "500.0")
    assert rows[0]["params.stack"] == "0_eager"


def test_json_is_strict_and_holds_the_samples(capfdbinary, root):
    def no_constant(name):
        raise AssertionError(name)

    found = json.loads(text(capfdbinary, root, "--format", "json"), parse_constant=no_constant)
    _, records, ids = root
    assert [one.pop("run_id") for one in found] == ids[:3]
    assert found[0] == json.loads(json.dumps(records[0]))
    assert found[2]["samples"] == records[2]["samples"]
    assert found[1]["metrics"]["error/rel_l2"] is found[1]["metrics"]["error/max_abs"] is None


def test_parquet_has_types_and_samples(root, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'pi0exp[parquet]'")
    file = tmp_path / "toy.parquet"
    assert export.main(["toy", "--format", "parquet", "--root", str(root[0]), "--out", str(file)]) == 0
    assert "3 runs of toy" in capsys.readouterr().err
    found = parquet.read_table(file).to_pylist()
    _, records, ids = root
    assert [row["run_id"] for row in found] == ids[:3]
    assert found[0]["metrics.latency_ms/p50"] == records[0]["metrics"]["latency_ms/p50"]
    assert found[0]["samples.latency_ms"] == records[0]["samples"]["latency_ms"]
    assert found[1]["samples.latency_ms"] is found[0]["metrics.power_w/mean"] is None
    assert math.isnan(found[1]["metrics.error/rel_l2"])


def test_without_pyarrow_it_is_said(root, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    told = refused(capsys, "toy", "--format", "parquet", "--root", root[0], "--out", tmp_path / "x")
    assert "pip install 'pi0exp[parquet]'" in told


def test_what_cannot_be_found_or_written(root, capsys, tmp_path):
    csv_of = ("--format", "csv", "--root", root[0])
    assert "no such study" in refused(capsys, "nothing", *csv_of)
    assert "other, toy" in refused(capsys, "nothing", *csv_of)
    assert "there is no store" in refused(capsys, "toy", "--format", "csv", "--root", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "plain").write_text("kept")
    assert "plain" in refused(capsys, "toy", *csv_of, "--out", tmp_path / "plain" / "x.csv")
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    assert str(tmp_path / "mlflow.db") in refused(capsys, "toy", "--format", "csv", "--root", tmp_path)


def test_a_full_disk_behind_stdout(root, capsys, monkeypatch):
    class Full:
        buffer = property(lambda self: self)

        def write(self, content):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        code = export.main(["toy", "--format", "csv", "--root", str(root[0])])
    assert code == 2
    assert capsys.readouterr().err == "pi0exp: stdout: No space left on device\n"


def test_a_file_is_replaced_whole(root, tmp_path, capsys):
    file = tmp_path / "toy.csv"
    file.write_text("old")
    assert export.main(["toy", "--format", "csv", "--root", str(root[0]), "--out", str(file)]) == 0
    assert file.read_text().startswith("run_id,study,key,outcome,")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.csv"]
