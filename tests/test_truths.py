"""Truths that are kept between points: only where nothing that they depend on has changed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import plain_config
from torch import Tensor

from pi0exp import key as keys
from pi0exp import subject, truths
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.policy_subject import PolicySubject
from pi0exp.truths import TruthFolder, kept, key_of
from pi0exp.workload import HostInput, verification_inputs

H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90", driver="580.1", versions={"torch": "2.11.0"})
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def made(*words: str) -> PolicySubject:
    found = subject.subject(plain_config("model=tiny", *words))
    assert isinstance(found, PolicySubject)
    return found


def inputs(*words: str) -> list[HostInput]:
    one = made(*words)
    return verification_inputs(one.workload, one.dimensions, one.normalization, 8)


def test_what_was_kept_is_found_as_it_was(tmp_path: Path):
    actions, calls = [torch.randn(1, 10, 32), torch.randn(2, 10, 32).double()], []

    def compute() -> list[Tensor]:
        calls.append(1)
        return actions

    folder = TruthFolder(tmp_path / "truths")
    first, second = (kept(folder, "ab", compute) for _ in range(2))
    assert first == (actions, "computed in this run")
    assert all(map(torch.equal, second[0], actions))
    assert [tensor.dtype for tensor in second[0]] == [tensor.dtype for tensor in actions]
    assert second[1].startswith("of 20")
    assert calls == [1]
    kept(folder, "cd", compute)
    assert calls == [1, 1]
    assert sorted(path.name for path in folder.path.iterdir()) == ["ab.pt", "cd.pt"]


def test_a_file_that_holds_something_else_is_told(tmp_path: Path):
    folder = TruthFolder(tmp_path)
    (tmp_path / "ab.pt").write_bytes(b"no truth")
    folder.keep("cd", [torch.zeros(1)])
    (tmp_path / "cd.pt").rename(tmp_path / "ef.pt")
    for key in ("ab", "ef"):
        with pytest.raises(UserError, match=rf"{key}\.pt is no truth .*: delete it"):
            folder.find(key)


def test_where_nothing_can_be_written_it_is_computed_and_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    actions, told = kept(TruthFolder(tmp_path / "file" / "truths"), "ab", lambda: [torch.ones(1)])
    assert actions == [torch.ones(1)]
    assert told.startswith("computed in this run; not kept: Not a directory")


def test_the_key_tells_apart_whatever_a_truth_depends_on(monkeypatch: pytest.MonkeyPatch):
    given, what = inputs(), ("a model", 0)
    other = replace(given[3], noise=given[3].noise + 1e-7)
    found = [
        key_of(H200, what, given),
        key_of(replace(H200, driver="580.2"), what, given),
        key_of(replace(H200, versions={"torch": "2.11.1"}), what, given),
        key_of(H200, ("a model", 1), given),
        key_of(H200, what, given[:4]),
        key_of(H200, what, [*given[:3], other, *given[4:]]),
        key_of(H200, what, inputs("workload.seed=1")),
    ]
    monkeypatch.setattr(truths, "source_digest", lambda: "other code")
    found.append(key_of(H200, what, given))
    assert len(set(found)) == len(found)
    monkeypatch.setattr(truths, "source_digest", keys.source_digest)
    assert key_of(H200, what, inputs()) == found[0]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PolicySubject]:
    """Subjects that computed a truth; it is no real one."""
    seen: list[PolicySubject] = []

    def truth(self: PolicySubject, checks: object, device: torch.device) -> list[Tensor]:
        seen.append(self)
        return [torch.full((1,), float(len(seen)))]

    monkeypatch.setattr(PolicySubject, "truth", truth)
    monkeypatch.setenv("PI0EXP_CEILINGS", str(tmp_path / "ceilings.json"))
    monkeypatch.setattr("pi0exp.policy_subject.this_machine", lambda: H200)
    return seen


def truth_of(device: torch.device, *words: str) -> tuple[float, str]:
    one = made(*words)
    given = verification_inputs(one.workload, one.dimensions, one.normalization, one.observations)
    [actions], told = one.truth_of(given, [], device)
    return float(actions), told


def test_points_that_differ_in_the_stack_share_a_truth(computed: list[PolicySubject], tmp_path: Path):
    assert truth_of(CUDA) == (1.0, "computed in this run")
    for words in (["attention=sdpa"], ["stack=7_hoists"], ["measure=quick"], ["workload=default"]):
        value, told = truth_of(CUDA, *words)
        assert value == 1.0
        assert told.endswith(", of the same code, machine, weights and inputs")
    assert [path.parent for path in tmp_path.glob("truths/*")] == [tmp_path / "truths"]


@pytest.mark.parametrize(
    "words",
    [
        ["model.seed=1"],
        ["model=tiny_pi05"],
        ["workload=masked"],
        ["workload.num_steps=5"],
        ["workload.horizon=5"],
        ["precision=fp32"],
        ["precision=fp8"],
        ["measure.observations=16"],
    ],
    ids=" ".join,
)
def test_other_points_have_their_own(words: list[str], computed: list[PolicySubject]):
    assert truth_of(CUDA)[0] == 1.0
    assert truth_of(CUDA, *words) == (2.0, "computed in this run")


@pytest.mark.parametrize("words", [["measure.reuse_truth=false"], ["measure=thorough"]], ids=" ".join)
def test_it_is_computed_again_where_that_is_asked_for(words: list[str], computed: list[PolicySubject], tmp_path: Path):
    assert [truth_of(CUDA, *words)[0] for _ in range(2)] == [1.0, 2.0]
    assert not (tmp_path / "truths").exists()


def test_on_a_cpu_it_is_always_computed(computed: list[PolicySubject], tmp_path: Path):
    assert [truth_of(CPU)[0] for _ in range(2)] == [1.0, 2.0]
    assert not (tmp_path / "truths").exists()
