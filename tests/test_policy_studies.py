"""The studies of the whole policy, whole, on the tiny model: each of their points that can run without a GPU runs.

Points of a study share a process, graphs are pretended and nothing is compiled (`whole_study.py`): seconds a point.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from cli import QUICK, REPOSITORY, TESTS, environment, runs

from pi0exp import compose, sweep
from pi0exp.report.__main__ import main as report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FEW = (*QUICK, "measure.samples=2", "measure.warmup_calls=1")
STEPS = "workload.num_steps=2"
ELSEWHERE = {
    "test_subject_studies.py": ("gemm_efficiency", "graph_granularity", "kernels", "ladder_layers"),
    "test_search_whole.py": ("search",),
}
"""Studies that run whole in other files."""
STUDIES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    # Stacks with Triton kernels need a GPU; what these studies take apart or vary is then another stack.
    "ablation": (("stack=7_hoists", STEPS), {"graphs=none", "attention=eager", "image_masking=keep"}),
    "attention_backends": ((STEPS,), {"attention=eager", "attention=sdpa", "attention.backend=math"}),
    "batch_scaling": (
        ("stack=7_hoists", "workload.batch_size=1,3", STEPS),
        {"workload.batch_size=1", "workload.batch_size=3"},
    ),
    "breakdown": ((STEPS,), {"stack=0_eager", "stack=2_sdpa", "stack=7_hoists", "stack=8_compiled"}),
    "compile_modes": ((STEPS,), {"compile_mode=none", "compile_mode=default", "compile_mode.region=block"}),
    "fidelity": (
        ("measure.observations=8", "measure.samples=2", STEPS),
        {"attention=sdpa", "stack=fork_best", "stack=fork_best_masked", "stack=8_compiled", "precision=fp32"},
    ),
    "graph_capture": ((STEPS,), {"graphs=none", "graphs=split", "graphs=manual", "compile_mode=default"}),
    "ladder": (("workload=masked", STEPS), {"stack=0_eager", "stack=1_graphs", "stack=7_hoists", "stack=8_compiled"}),
    "masking": (("stack=7_hoists", STEPS), {"image_masking=skip", "image_masking=keep", "image_masking=ignore"}),
    "perf_per_watt": (("measure.power_s=0", STEPS), {"stack=1_graphs", "stack=2_sdpa", "stack=8_compiled"}),
    "prompt_and_horizon": (("stack=7_hoists",), {"workload.horizon=50", "workload.num_steps=1"}),
}
"""Study -> words beside it, and parameters of points that are to be ok."""


def test_every_study_runs_whole_somewhere():
    elsewhere = {name for names in ELSEWHERE.values() for name in names}
    assert set(STUDIES) | elsewhere == set(compose.files()["study"])
    for file, names in ELSEWHERE.items():
        assert all(f"study={name}" in (TESTS / file).read_text() for name in names)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    """Whatever has imported everything, and forks for a study."""
    line = [sys.executable, str(TESTS / "whole_study.py")]
    env = environment(tmp_path_factory.mktemp("scratch"))
    given = {"stdin": PIPE, "stdout": PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(line, cwd=REPOSITORY, env=env, **given) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)  # and a study that did not come to an end


def whole(server: subprocess.Popen[str], root: Path, *words: str) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    out, err = root / "stdout.txt", root / "stderr.txt"
    print(json.dumps([str(out), str(err), *words, f"track.root={root}"]), file=server.stdin, flush=True)
    code = server.stdout.readline()
    assert code == "0\n", (out.read_text()[-3000:], err.read_text()[-3000:])
    return out.read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_study(study, server, tmp_path, capsys):
    words, expected = STUDIES[study]
    given = (f"study={study}", *FEW, *words)
    out = whole(server, tmp_path, *given)
    points = len(sweep.planned(given))
    assert out.splitlines()[-1] == f"study {study}: {points} of {points} points settled, complete"
    found = runs(tmp_path, study)
    assert {run.data.tags["outcome"] for run in found} <= {"ok", "unsupported"}
    fine = [run for run in found if run.data.tags["outcome"] == "ok"]
    assert all({"latency_ms/p50", "error/rel_l2"} <= set(run.data.metrics) for run in fine)
    assert expected <= {f"{name}={value}" for run in fine for name, value in run.data.params.items()}
    capsys.readouterr()
    assert report([study, "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "CPU" in shown
    assert "tiny" in shown


def test_second_time_everything_is_settled(server, tmp_path):
    words = ("study=perf_per_watt", *FEW, *STUDIES["perf_per_watt"][0])
    whole(server, tmp_path, *words)
    before = len(runs(tmp_path, "perf_per_watt"))
    again = whole(server, tmp_path, *words)
    assert again.count("already measured") == before
    assert len(runs(tmp_path, "perf_per_watt")) == before
