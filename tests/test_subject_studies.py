"""The studies whose subject is not the whole policy, whole and on a CPU: what runs, what says why it does not."""

import json
import re
from pathlib import Path

import pytest
from cli import QUICK, artifact, error_line, pi0exp, runs, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def whole(root: Path, *words: str) -> str:
    """What a study prints that ends well. A compiler takes minutes on a machine that is busy."""
    process = start(root, *QUICK, *words)
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, (out, err)
    return out


def outcomes(root: Path, study: str, *names: str) -> dict[str, str]:
    """Values of these parameters of each run -> its outcome."""
    return {" ".join(run.data.params[name] for name in names): run.data.tags["outcome"] for run in runs(root, study)}


def test_ladder_layers(tmp_path):
    whole(tmp_path, "study=ladder_layers", "subject.depth=2")
    found = outcomes(tmp_path, "ladder_layers", "stack")
    assert found == {
        "0_eager": "ok",
        "layers_kernels": "unsupported",
        "layers_sdpa": "ok",
        "layers_flash": "ok",
        "layers_compiled": "ok",
    }
    first = runs(tmp_path, "ladder_layers")[0]
    assert first.data.params["subject"] == "layers"
    assert {"latency_ms/p50", "stage_ms/prefill", "error/rel_l2"} <= set(first.data.metrics)


def test_graph_granularity(tmp_path):
    whole(tmp_path, "study=graph_granularity", "subject.count=2")
    found = outcomes(tmp_path, "graph_granularity", "subject.kind", "compile_mode", "graphs")
    assert len(found) == 10
    assert {name for name, outcome in found.items() if outcome == "ok"} == {
        *("elementwise none none", "gemms none none", "transformer none none"),
        *("elementwise default none", "transformer default none"),
    }
    assert {outcome for name, outcome in found.items() if name.endswith("manual")} == {"unsupported"}


def test_kernels(tmp_path):
    out = whole(tmp_path, "study=kernels")
    found = outcomes(tmp_path, "kernels", "subject.op")
    assert len(found) > 9
    assert set(found.values()) == {"unsupported"}
    assert "interpreter" in out
    alone = pi0exp(tmp_path, *QUICK, "subject=kernel", "subject.op=gemm")
    assert alone.returncode == 3


def test_gemm_efficiency_and_going_on_with_it(tmp_path):
    """Without graphs, which need a GPU; the second time everything is settled."""
    words = ("study=gemm_efficiency", "graphs=none", "workload.num_steps=1")
    whole(tmp_path, *words)
    found = outcomes(tmp_path, "gemm_efficiency", "precision", "gemm")
    assert len(found) == 16
    assert [name for name, outcome in found.items() if outcome != "unsupported"] == ["bf16 blas"]
    assert found["bf16 blas"] == "ok"
    [made] = [run for run in runs(tmp_path, "gemm_efficiency") if run.data.tags["outcome"] == "ok"]
    assert made.data.metrics["cases/ms"] > 0
    samples = json.loads(artifact(tmp_path, made, "result.json").read_text())["samples"]
    assert len(samples["case_us/prefill/68x48x128"]) == 7
    again = whole(tmp_path, *words)
    assert len(runs(tmp_path, "gemm_efficiency")) == 16
    assert again.count("already measured") == 16


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["subject=layers", "subject.depth=0"], "subject.depth is 0; it must be 1 or more"),
        (["subject=kernel", "subject.op=rmsnorm"], "subject.op is 'rmsnorm'; choose one of "),
        (["subject=products", "attention=sdpa"], "attention=sdpa has no effect with subject=products"),
        (["subject=scalars"], "scalars"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(words, cause, tmp_path):
    assert cause in error_line(pi0exp(tmp_path, *QUICK, *words))


def test_explained(tmp_path):
    done = pi0exp(tmp_path, "study=ladder_layers", "model=tiny", "measure=explain")
    assert done.returncode == 0, done
    assert re.search(r"prefill 0\.0*[1-9]\d* GFLOP", done.stdout)
    assert "subject  layers" in done.stdout
