"""study=search: its settings, and what is refused before its first point."""

import sys

import pytest
from search_fakes import H200, composed_once

from pi0exp import compose
from pi0exp.errors import UserError
from pi0exp.search.narrow import narrowed
from pi0exp.search.plan import command, plan
from pi0exp.search.proposals import optuna
from pi0exp.search.settings import Objective, SearchConfig, settings

pytest.importorskip("optuna", reason="the extra `search` is not installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    composed_once(monkeypatch)


# ---- settings


def given(*words, **values):
    with compose.session():
        return settings(values, words)


def test_objectives_are_one_word_or_a_list():
    both = (Objective.latency, Objective.energy)
    assert given(objectives="latency").objectives == (Objective.latency,)
    assert given(objectives=["latency", "energy"]).objectives == both
    assert given("search.objectives=latency,energy", objectives=["latency"]).objectives == both
    assert given("search.stacks=0_eager,2_sdpa").stacks == ("0_eager", "2_sdpa")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n_trials": 0}, "search.n_trials is 0; it must be 1 or more"),
        ({"n_trials": "many"}, "search.n_trials: "),
        ({"seed": -1}, "search.seed is -1; it must be 0 or more"),
        ({"candidates": 0}, "search.candidates is 0"),
        ({"repeats": 0}, "search.repeats is 0"),
        ({"objectives": ["speed"]}, "search.objectives[0]: Invalid value 'speed'"),
        ({"objectives": ["energy"]}, "search.objectives is energy; choose latency or latency,energy"),
        ({"objectives": []}, "search.objectives is empty; choose"),
        ({"stacks": ["2_sdpa", "2_sdpa"]}, "search.stacks names 2_sdpa twice"),
        ({"trials": 3}, "search.trials: Key 'trials' not in 'SearchConfig'"),
    ],
)
def test_mistakes_are_told(values, told):
    with pytest.raises(UserError) as caught:
        given(**values)
    assert str(caught.value).startswith(told)


def test_one_search_has_one_seed():
    with pytest.raises(UserError, match=r"search.seed=1,2: one search has one value of it"):
        given("search.seed=1,2")


def planned(*words, **values):
    with compose.session():
        left = narrowed(["study=search", "model=tiny", "measure=quick", "measure.device=cpu", *words])
    return plan(left, SearchConfig(**{"write": None, "stacks": ("0_eager", "2_sdpa")} | values))


def test_plan_has_the_stacks_that_can_run():
    made = planned("workload.seed=7")
    assert [one.name for one in made.named] == ["0_eager"]
    assert "needs a GPU" in made.absent["2_sdpa"]
    assert made.seed == 7
    assert made.named[0].row is not None
    twin = planned(stacks=("layers_sdpa", "layers_flash", "openpi_default"), n_trials=2)
    assert [one.words for one in twin.named][1] == ("stack=layers_flash",), "it has a setting that is no factor"
    assert twin.named[1].row is None


@pytest.mark.parametrize(
    ("words", "values", "told"),
    [
        ([], {"stacks": ("none_such",)}, "search.stacks: none_such: no such stack; there are 0_eager, "),
        ([], {"stacks": ("0_eager", "layers_sdpa"), "n_trials": 1}, "search.n_trials is 1, fewer than the 2 named"),
        ([], {"objectives": tuple(Objective)}, "search.objectives=latency,energy needs a GPU, whose energy"),
        (["subject=ops"], {}, "subject=ops: study=search is of stacks of the whole policy"),
        (["model.checkpoint=/none/such"], {}, "/none/such"),
    ],
)
def test_plan_refuses_before_the_first_point(words, values, told):
    with pytest.raises(UserError) as caught:
        planned(*words, **values)
    assert told in str(caught.value)


def test_energy_needs_its_pass(monkeypatch):
    monkeypatch.setattr("pi0exp.search.plan.target_machine", lambda device: (H200, []))
    with pytest.raises(UserError, match=r"measure\.power_s is 0: set measure\.power_s=5"):
        planned(objectives=tuple(Objective))
    assert planned("measure.power_s=5", objectives=tuple(Objective)).named


def test_missing_optuna_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"study=search needs Optuna, .*: pip install 'pi0exp\[search\]'"):
        optuna()
    assert planned("measure=explain").explain, "which proposes nothing"
    with pytest.raises(UserError, match="needs Optuna"):
        planned()


def test_command_is_that_of_any_machine():
    words = [
        "study=search",
        "track.root=/home/me",
        "search.write=/home/me/x.yaml",
        "resume=false",
        "attention=eager,sdpa",
    ]
    assert command(words) == "python -m pi0exp study=search attention=eager,sdpa"
