"""The Makefile with PYTHON=...: it uses that environment as it is, or says what it lacks."""

import shutil
import subprocess
import sys
import venv

import pytest
from cli import REPOSITORY, environment

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder, *words, scratch):
    return subprocess.run(
        ["make", "--no-print-directory", *words], cwd=folder, env=environment(scratch), capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path):
    """A copy of what make needs, to see what it leaves there."""
    folder = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "mlruns", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=left_out)
    return folder


def contents(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_demo_in_this_environment(checkout, tmp_path):
    before = contents(checkout)
    done = make(checkout, "demo", f"PYTHON={sys.executable}", scratch=tmp_path)
    assert done.returncode == 0, done
    assert "workload=aloha" in done.stdout
    assert "outcome  ok" in done.stdout
    assert (checkout / "mlruns" / "mlflow.db").is_file()
    assert {path for path in contents(checkout) - before if "mlruns" not in path.parts} == set()


def test_environment_that_lacks_packages(checkout, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    before = contents(checkout)
    for target in ("demo", "test", "lint"):
        done = make(checkout, target, f"PYTHON={tmp_path}/bare/bin/python", scratch=tmp_path)
        assert done.returncode == 2
        assert "lacks: torch>=2.11, triton>=3.6, numpy, hydra-core" in done.stderr
        assert "Traceback" not in done.stderr
    assert contents(checkout) == before


def test_no_target_shows_the_targets(tmp_path):
    done = make(REPOSITORY, scratch=tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()][:4] == ["help", "install", "demo", "test"]
