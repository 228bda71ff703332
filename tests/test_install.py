"""A normal install, used from elsewhere: configuration, kernels and recordings come along, results do not."""

import os
import shutil
import subprocess
import sys

import pytest
from cli import QUICK, REPOSITORY, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a normal install of a copy of this checkout fills."""
    source, target = tmp_path_factory.mktemp("source") / "pi0exp", tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns(".*", "mlruns", "build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, source, symlinks=True, ignore=left_out)
    (source / "README.md").touch()
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([*line, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def elsewhere(installed, folder, *words):
    env = environment(folder) | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


def test_everything_comes_along(installed, tmp_path):
    package = installed / "pi0exp"
    assert not any(path.is_symlink() for path in package.rglob("*"))
    for folder in ("conf", "kernels", "experiments/study", "experiments/observations"):
        there, here = package / folder, REPOSITORY / folder
        for suffix in ("py", "yaml", "npz"):
            if folder.startswith("experiments") and suffix == "py":
                continue
            names = {path.relative_to(here) for path in here.rglob(f"*.{suffix}")}
            assert {path.relative_to(there) for path in there.rglob(f"*.{suffix}")} >= names
    tables = {path.name for path in (REPOSITORY / "pi0exp" / "gemm" / "tables").iterdir()}
    assert {path.name for path in (package / "gemm" / "tables").iterdir()} == tables
    assert (package / "py.typed").is_file()
    code = "import pi0exp, pi0exp.kernels as kernels; print(pi0exp.__file__, kernels.__file__, sep='\\n')"
    done = elsewhere(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done
    assert all(line.startswith(str(installed)) for line in done.stdout.splitlines())


def test_help_and_a_point_from_elsewhere(installed, tmp_path):
    shown = elsewhere(installed, tmp_path, "-m", "pi0exp", "--help")
    assert shown.returncode == 0, shown
    assert "study: ablation, " in shown.stdout
    done = elsewhere(installed, tmp_path, "-m", "pi0exp", *QUICK, "workload=aloha")
    assert done.returncode == 0, done
    assert "outcome  ok" in done.stdout
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()
    assert not (installed / "mlruns").exists()


def test_console_script(installed, tmp_path):
    script = installed / "bin" / "pi0exp"
    assert os.access(script, os.X_OK)
    done = elsewhere(installed, tmp_path, str(script), "attention=flsh")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
