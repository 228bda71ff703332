"""Where a call spends its time: the functions of the stages are marked where there are such, and left as they were."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CPU, built, noise_for, subject_of, tiny_observation, tiny_policy

from pi0exp import stages
from pi0exp.graphs.manual import Manual
from pi0exp.stages import stage_metrics, stage_samples


class Staged:
    """Two functions whose time is known; what lies between them takes 1 ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seen: list[int] = []

    def spend(self, ms: float) -> None:
        self.now += ms / 1e3

    @contextmanager
    def watched(self, watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]):
        self.inner = [watch("vision", self.spend), watch("denoise", self.spend)]
        yield
        self.inner = []

    def call(self, index: int) -> None:
        self.seen.append(index)
        self.inner[0](5.0 + index)
        self.spend(1.0)
        for _ in range(3):
            self.inner[1](2.0)


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Staged:
    made = Staged()
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def ignore(text: str) -> None:
    pass


def test_stages_and_what_lies_between(staged: Staged):
    found = stage_samples(staged, CPU, 3, 1e9, ignore)
    assert found["vision"] == pytest.approx([5, 6, 7])
    assert found["denoise"] == pytest.approx([6, 6, 6])
    assert found["other"] == pytest.approx([1, 1, 1])
    assert stage_metrics(found) == pytest.approx({"stage_ms/vision": 6, "stage_ms/denoise": 6, "stage_ms/other": 1})
    assert staged.seen == [0, 0, 1, 2], "one call before those that count"


def test_stages_end_at_the_time_limit(staged: Staged):
    assert len(stage_samples(staged, CPU, 1000, 0.05, ignore)["vision"]) == 4  # 12, 13, 14 ms, and 15 ms beyond it


def test_without_functions_there_is_nothing_to_measure():
    told: list[str] = []
    assert stage_samples(SimpleNamespace(watched=lambda watch: None), CPU, 3, 1e9, told.append) == {}
    assert told == []


def test_policy_has_every_stage():
    instance = built(subject_of("model=tiny"))
    found = stage_samples(instance, CPU, 1, 1e9, ignore)
    assert set(found) == {"vision", "prefill", "denoise", "other"}
    assert all(len(times) == 1 and times[0] > 0 for times in found.values())


def test_policy_is_as_it_was_afterwards():
    """Also where an option has put functions of its own there."""
    policy, observation = tiny_policy(), tiny_observation()
    noise = noise_for(policy, observation)
    policy.begin("toy")
    policy.wrap_stage("denoise", lambda function: lambda *args: function(*args), "a toy")
    before, expected = dict(vars(policy.model)), policy.sample_actions(observation, noise)
    seen: list[str] = []

    def watch(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: seen.append(stage) or function(*args)

    with policy.watched(watch):
        assert torch.equal(policy.sample_actions(observation, noise), expected)
    assert seen == ["vision", "prefill", "denoise", *["denoise"] * policy.num_steps]
    assert vars(policy.model) == before
    with pytest.raises(KeyError), policy.watched(watch):
        raise KeyError
    assert vars(policy.model) == before
    assert torch.equal(policy.sample_actions(observation, noise), expected)


def test_whole_graph_keeps_no_stages_apart():
    policy = tiny_policy()
    policy.begin("graphs")
    assert policy.stages_apart
    Manual().apply(policy)
    assert not policy.stages_apart
    policy.wrap_call(lambda call: call, "a toy")
    assert not policy.stages_apart, "what wraps a graph does not take it apart"
