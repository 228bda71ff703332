"""Sweeps whose points run elsewhere: on a local Ray cluster and in submitit's processes. Their results come home."""

import os
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import TOY, error_line, pi0exp, processes, runs, start
from hydra.core.utils import JobReturn, JobStatus

from pi0exp import compose, launchers, outcomes
from pi0exp.config import TrackConfig
from pi0exp.errors import UserError

RAY = (
    "hydra/launcher=ray",
    "+hydra.launcher.ray.init.num_cpus=2",
    "+hydra.launcher.ray.init.include_dashboard=false",
    "+hydra.launcher.ray.remote.max_retries=0",
)
SUBMITIT = ("hydra/launcher=submitit_local",)


def job(value, *overrides: str, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    return JobReturn(overrides=list(overrides), status=status, _return_value=value)


# ---- parts


def test_points_are_gathered_with_those_that_died(monkeypatch):
    monkeypatch.setattr(outcomes, "POINTS", [])
    good = {"outcome": "ok", "exit_code": 0}
    died = job(RuntimeError("\n the worker\n is gone"), "attention=sdpa", "+a.b=1", status=JobStatus.FAILED)
    outcomes.gather([job(good), died])
    first, second = outcomes.POINTS
    assert first == good | {"sweep": True}
    assert second["outcome"] == "error"
    assert second["reasons"] == ["its job died: RuntimeError: the worker"]
    assert second["params"] == {"attention": "sdpa", "a.b": "1"}
    assert outcomes.exit_code() == 5
    assert outcomes.closing("x", outcomes.POINTS, False).startswith("study x: 1 of 2 points settled; missing: #1 error")


def test_one_that_died_does_not_hide_the_others():
    ended = []

    def result(number: int) -> JobReturn:
        if number == 1:
            raise RuntimeError("gone")
        return job(number)

    found = launchers._each([0, 1, 2], [["a=0"], ["a=1"], ["a=2"]], result, ended.append)
    assert [one._return_value for one in (found[0], found[2])] == [0, 2]
    assert (found[1].status, found[1].overrides) == (JobStatus.FAILED, ["a=1"])
    assert ended == []


def test_an_interrupt_ends_all_jobs():
    ended = []

    def result(number: int) -> JobReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launchers._each([0, 1], [[], []], result, ended.append)
    assert ended == [[0, 1]]


def test_files_of_a_sweep_are_where_its_jobs_see_them(monkeypatch, tmp_path):
    monkeypatch.setattr(compose.tempfile, "gettempdir", lambda: str(tmp_path))
    here = f"{tmp_path}/pi0exp-sweep-{os.getuid()}"
    assert compose.scratch("hydra._internal.core_plugins.basic_launcher.BasicLauncher") == here
    assert compose.scratch("hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher") == here
    slurm = compose.scratch("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher")
    assert Path(slurm) == compose.default_root() / ".sweep"


def test_several_hosts_need_a_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    slurm, ray = (type(name, (), {})() for name in ("SlurmLauncher", "RayLauncher"))
    monkeypatch.setattr(launchers, "_ray_hosts", lambda launcher: 2)
    for launcher in (slurm, ray):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
            launchers.store_for(launcher, TrackConfig())


def test_slurm_jobs_are_cancelled_by_slurm():
    cancelled = []
    jobs = [
        SimpleNamespace(done=lambda force_check=False: True, cancel=lambda: cancelled.append("done")),
        SimpleNamespace(done=lambda force_check=False: bool(cancelled), cancel=lambda: cancelled.append("running")),
    ]
    launchers._end_submitit(jobs)
    assert cancelled == ["running"]


def test_slurm_without_a_server_is_refused(tmp_path):
    done = pi0exp(
        tmp_path, *TOY, "-m", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}", "+subject.fault=none"
    )
    assert "set track.uri or MLFLOW_TRACKING_URI" in error_line(done)


# ---- whole sweeps


@pytest.fixture
def ray_files():
    """Let Ray keep its sockets where their names stay short enough for one; pytest's folders are long."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield {"RAY_TMPDIR": folder}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [RAY, SUBMITIT], ids=["ray", "submitit_local"])
def test_sweep_elsewhere(tmp_path, launcher, ray_files):
    """Two good points, one that cannot run here, one that is refused, and one whose whole job is killed."""
    words = (*TOY, "-m", *launcher, "+subject.fault=none,kill_job,unmet,input,traced")
    done = pi0exp(tmp_path, *words, **ray_files)
    assert done.returncode == 5, done
    assert done.stdout.splitlines()[-1] == (
        "study adhoc: 3 of 5 points settled; missing: #1 error, #3 refused; the same command again measures only these"
    )
    table = " ".join(done.stdout.split("\n#  ")[-1].split())  # its cells may be folded
    assert "error: its job died: " in table
    assert "unsupported: it is not supported anywhere" in table
    assert "refused: subject.fault is input" in table
    found = runs(tmp_path)
    assert sorted(run.data.tags["outcome"] for run in found) == ["ok", "ok", "unsupported"]
    assert len({run.data.tags["key"] for run in found}) == 3

    again = pi0exp(tmp_path, *TOY, "-m", *launcher, "+subject.fault=none,traced", **ray_files)
    assert again.returncode == 0, again
    assert again.stdout.splitlines()[-1] == "study adhoc: 2 of 2 points settled, complete"
    assert len(runs(tmp_path)) == 3, "what is settled is not measured again"
    assert processes(tmp_path / "pi0exp-") == []


@pytest.mark.slow
def test_a_cluster_that_does_not_start_is_refused(tmp_path):
    """By name of what Ray says: here that the folder of its sockets has a name too long."""
    done = pi0exp(tmp_path, *TOY, "-m", *RAY, "+subject.fault=none", RAY_TMPDIR=str(tmp_path / ("long" * 20)))
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pi0exp: hydra/launcher=ray: Ray does not start: ")
    assert "107 bytes" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [RAY, SUBMITIT], ids=["ray", "submitit_local"])
def test_interrupt_ends_the_points(tmp_path, launcher, ray_files):
    process = start(tmp_path, *TOY, "-m", *launcher, "+subject.fault=hang", **ray_files)
    deadline = time.monotonic() + 240
    while not any("-m pi0exp.measure" in line for line in processes(tmp_path / "pi0exp-")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    os.kill(process.pid, signal.SIGINT)  # the command alone, as a scheduler does
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "interrupted by Ctrl-C" in err
    deadline = time.monotonic() + 20
    while left := processes(tmp_path / "pi0exp-"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert [run.data.tags["outcome"] for run in runs(tmp_path)] == ["interrupted"]
