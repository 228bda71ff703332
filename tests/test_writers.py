"""Eight writers at once, 200 points, one store: a SQLite file, and an MLflow server on PostgreSQL."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from cli import REPOSITORY, TESTS, environment
from many_writers import EACH, WRITERS
from mlflow import MlflowClient
from postgres import lacking, mlflow_server, postgres

POINTS = WRITERS * EACH


def write(scratch, *store: str, **variables: str) -> subprocess.CompletedProcess[str]:
    scratch.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(TESTS / "many_writers.py"), "many", *store],
        cwd=REPOSITORY,
        env=environment(scratch) | {"PYTHONPATH": f"{TESTS}{os.pathsep}{REPOSITORY}"} | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )


def check(uri: str) -> None:
    """All points are there, once, whole."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("many")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=5000)
    assert Counter(run.data.tags["outcome"] for run in found) == {"ok": POINTS}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.params["workload.seed"] for run in found} == {str(number) for number in range(POINTS)}
    assert len({run.data.tags["key"] for run in found}) == len(found) == POINTS
    assert {run.data.metrics["latency_ms/p50"] for run in found} == {1.0}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_sqlite_takes_eight_writers(tmp_path):
    done = write(tmp_path / "tmp", f"track.root={tmp_path}/mlruns")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "locked" not in done.stderr + done.stdout
    check(f"sqlite:///{tmp_path}/mlruns/mlflow.db")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(bool(lacking()), reason=lacking() or "there is one")
def test_postgresql_takes_eight_writers(tmp_path):
    (tmp_path / "files").mkdir()
    with postgres() as database, mlflow_server(database, tmp_path / "files") as uri:
        done = write(tmp_path / "tmp", f"track.uri={uri}", f"track.root={tmp_path}/local")
        assert done.returncode == 0, done.stderr[-3000:]
        check(uri)
        again = write(tmp_path / "tmp", f"track.root={tmp_path}/local", MLFLOW_TRACKING_URI=uri)
        assert again.returncode == 0, again.stderr[-3000:]
        assert again.stdout.count("(already measured; resume=false measures again)") == POINTS
        check(uri)
