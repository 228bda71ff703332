"""The command is killed (SIGKILL) at random moments of a sweep: no point is lost or there twice, nothing is left."""

import json
import os
import subprocess
import sys
from collections import Counter

import faults
import pytest
from cli import REPOSITORY, TESTS, environment, processes, runs
from killed_sweep import POINTS

KILLS = 50
ROW = faults.by_name("SIGKILL")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sweep_survives_being_killed_at_any_moment(tmp_path):
    (tmp_path / "tmp").mkdir()
    driver = subprocess.run(
        [sys.executable, str(TESTS / "killed_sweep.py"), str(tmp_path), "killed", str(KILLS), "20261124"],
        cwd=REPOSITORY,
        env=environment(tmp_path / "tmp") | {"PYTHONPATH": f"{TESTS}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    told = [json.loads(line) for line in driver.stdout.splitlines()]
    assert sum("killed" in one for one in told) == KILLS
    completed = [one for one in told if "completed" in one]
    assert [one["code"] for one in completed] == [0] * len(completed)
    torn = 0
    for one in completed:
        found = runs(tmp_path / "mlruns", f"killed_{one['completed']}")
        outcomes = Counter(run.data.tags["outcome"] for run in found)
        assert set(outcomes) <= {"ok", ROW.outcome}
        assert all(ROW.reason in run.data.tags["reasons"] for run in found if run.data.tags["outcome"] == ROW.outcome)
        settled = [run for run in found if run.data.tags["outcome"] == "ok"]
        assert len(settled) == len({run.data.tags["key"] for run in settled}) == POINTS
        assert {run.info.status for run in settled} == {"FINISHED"}
        assert {run.info.status for run in found} <= {"FINISHED", "KILLED"}, "none says that it still runs"
        histories = [run.data.metrics["latency_ms/p50"] for run in settled]
        assert histories == [1.0] * POINTS
        torn += outcomes[ROW.outcome]
    assert torn >= KILLS / 10, "kills must meet measurements, not only imports"
    assert processes(tmp_path / "tmp") == []
    assert list((tmp_path / "mlruns" / ".spool").glob("*.json")) == []
    rooms = list((tmp_path / "mlruns" / ".spool").glob(".*.room"))
    assert rooms == [], "room that was kept for results is given back"
