"""experiments/replays.py on a tiny model without a GPU: equal bits pass, a policy that forgets is found."""

import json

import pytest
import torch
from helpers import CPU, subject_of

from pi0exp.experiments import replays
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicySubject


def test_equal_calls_pass(capsys):
    assert replays.main(["--calls", "9", "--depth", "1", "model=tiny", "workload.num_steps=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["calls"], found["differing"], found["largest"]) == (9, 0, 0.0)


@pytest.mark.parametrize("change", [1e-6, float("nan")])
def test_a_call_that_differs_is_found(change, monkeypatch):
    made, count = PolicySubject.policy, iter(range(100))

    def forgetful(self: PolicySubject, device: torch.device) -> Policy:
        policy = made(self, device)
        policy.wrap_call(lambda call: lambda *given: call(*given) + (change if next(count) == 10 else 0.0), "drift")
        return policy

    monkeypatch.setattr(PolicySubject, "policy", forgetful)
    found = replays.replayed(subject_of("model=tiny", "workload.num_steps=1"), 9, CPU)
    assert found["differing"] == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--calls", "0"], 2, "--calls is 0"),
        (["no_such=1"], 2, "no_such"),
        ([], 3, "needs a GPU"),
    ],
)
def test_what_cannot_run_says_so(words, code, message, capsys):
    assert replays.main(words) == code
    assert message in capsys.readouterr().err
