"""Files that are no texts, on their way from the measuring process into the store."""

import json

import pytest
from cli import TESTS, TOY, artifact, pi0exp, runs

from pi0exp.card import card
from pi0exp.isolate import measure_isolated
from pi0exp.result import Outcome, Result


def test_file_of_the_measuring_process_becomes_an_artifact(tmp_path):
    results = tmp_path / "results"
    done = pi0exp(tmp_path / "store", *TOY, "+subject.fault=traced", f"track.results={results}")
    assert done.returncode == 0, done.stderr
    [run] = runs(tmp_path / "store")
    assert artifact(tmp_path / "store", run, "files/trace.json.gz").read_bytes() == b"\x1f\x8b trace"
    # Neither in the record nor in the file that is committed.
    assert json.loads(artifact(tmp_path / "store", run, "result.json").read_text())["files"] == {}
    [written] = results.glob("*/*/*.json")
    assert "trace" not in json.loads(written.read_text())["files"]


def test_file_without_a_result_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    plain = {"subject": {"_target_": "toy_subjects.Toy", "fault": "untold"}, "measure": {"device": "cpu"}}
    result = measure_isolated(plain, 120, lambda text: None, tmp_path)
    assert result.outcome is Outcome.ERROR
    assert list(tmp_path.iterdir()) == []


METRICS = {"latency_ms/p50": 20.0, "latency_ms/p90": 21.0, "latency_host_ms/p50": 22.0, "throughput_hz": 50.0}
GPU = {"kernels_share/gemm": 0.7, "kernels_share/norm": 0.296, "kernels_share/other": 0.004, "gpu/launches": 1234.0}


def test_card_has_a_line_for_the_time_of_the_gpu():
    made = {
        "params": {},
        "facts": {},
        "fingerprint": {"gpu": "NVIDIA H200", "vendor": "nvidia", "versions": {"torch": "2.11.0"}},
        "outcome": "ok",
        "numerics": "EXACT",
        "reasons": [],
        "study": "adhoc",
    }
    text = card(made | {"metrics": METRICS | GPU | {"gpu/idle_share": 0.041}}, "id", settled=False)
    assert "     GPU time  gemm 70 %, norm 30 %; 1234 launches; idle 4 % under the profiler\n" in text
    assert "GPU time" not in card(made | {"metrics": METRICS}, "id", settled=False)


TIMES = [*GPU, "kernels_ms/gemm", "kernels_ms_vision/gemm", "gemm/tflop_per_s", "stage_ms/vision"]


@pytest.mark.parametrize("name", TIMES)
def test_only_a_run_that_is_ok_has_times_of_kernels(name):
    with pytest.raises(ValueError, match="must not carry"):
        Result(Outcome.UNPROVEN, ["because"], metrics={name: 1.0})
