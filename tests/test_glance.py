"""experiments/glance.py, as far as it needs no GPU."""

from pathlib import Path

import pytest
from helpers import CPU, subject_of

from pi0exp.experiments import glance
from pi0exp.traces import read_trace

TRACES = Path(__file__).parent / "data" / "traces"


def test_groups_are_divided_by_dashes():
    words = ["stack=2_sdpa", "--", "stack=2_sdpa", "workload.horizon=50", "--", "--"]
    assert glance.groups(words) == [["stack=2_sdpa"], ["stack=2_sdpa", "workload.horizon=50"]]


def test_a_stack_is_timed_and_profiled(monkeypatch, capsys):
    """Without a GPU a profile has no kernels: a recorded one stands in its place."""
    monkeypatch.setattr(glance, "CALLS", 3)
    recorded, profiled = read_trace(TRACES / "kineto_h200_graph.json"), []

    def profile(instance, calls, *_):
        profiled.append(calls)
        return recorded

    monkeypatch.setattr(glance, "profile", profile)
    found = glance.glance(subject_of("model=tiny", "workload.num_steps=1"), CPU)
    assert len(found["samples_ms"]) == 3
    assert min(found["samples_ms"]) > 0
    assert profiled == [glance.PROFILED]
    assert found["breakdown"]["kernels"]
    shown = capsys.readouterr().out
    assert f"{found['ms']:.3f} ms" in shown
    assert found["breakdown"]["kernels"][0]["name"][:20] in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, ""),
        (["out.json", "no_such=1"], 2, "no_such"),
        (["out.json", "stack=2_sdpa"], 3, "needs a GPU"),
    ],
)
def test_what_cannot_run_says_so(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert glance.main(words) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
