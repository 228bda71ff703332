"""attention=triton on the tiny models, under Triton's interpreter; `test_kernels` has the kernels themselves.

TRITON_INTERPRET decides when a kernel's file is imported, so the interpreter has a process of its own: this file run as
a script, which prints a line of JSON for each point.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from helpers import built, noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from interpreter import interprets, points
from torch import Tensor

from pi0exp import build, config
from pi0exp.attention import triton_attention
from pi0exp.attention.eager import Eager
from pi0exp.attention.sdpa import Sdpa
from pi0exp.attention.triton_attention import TritonAttention, attend_by_batch, triton_attend
from pi0exp.errors import UnsupportedError
from pi0exp.kernels import attention_dense, attention_halves
from pi0exp.kernels.attention_dense import attend_dense
from pi0exp.kernels.attention_split import attend_split
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention
from pi0exp.model.mask import Mask
from pi0exp.model.precision import FP32, FP32_TRUTH
from pi0exp.option import Option
from pi0exp.policy import Policy
from pi0exp.verify import FP32_LIMIT, rel_l2

Op = Callable[..., Tensor]

# What a kernel call may lose: (op, its arguments) -> result.
FAULTS: dict[str, Callable[..., Tensor]] = {
    "nothing": lambda op, q, k, v, keys, blind, scale: op(q, k, v, keys, blind, scale),
    "keys": lambda op, q, k, v, keys, blind, scale: op(q, k, v, None, blind, scale),
    "keys of other rows": lambda op, q, k, v, keys, blind, scale: op(
        q, k, v, None if keys is None else keys[:1].expand_as(keys), blind, scale
    ),
    "blind": lambda op, q, k, v, keys, blind, scale: op(q, k, v, keys, False, scale),
    "scale": lambda op, q, k, v, keys, blind, scale: op(q, k, v, keys, blind, 1.02 * scale),
}
OBSERVATIONS = {
    "full": {"lengths": (8,)},
    "batch": {"cameras": ((1, 1, 1),) * 3, "lengths": (8, 8, 8)},
    "masked differently": {"cameras": ((1, 1, 1), (1, 0, 1), (0, 1, 0)), "lengths": (8, 3, 0)},
    "masked alike": {"cameras": ((1, 0, 1),), "lengths": (6,)},
}
RIGHT = [("tiny", "masked differently"), ("tiny_pi05", "masked alike")]
RIGHT_SLOWLY = [("tiny", "batch"), ("tiny_pi05", "full"), ("tiny_pi05", "masked differently")]
WRONG = [
    ("tiny", "masked alike", "denoise", "keys"),
    ("tiny", "masked differently", "denoise", "keys of other rows"),
    ("tiny", "full", "denoise", "blind"),
    ("tiny", "masked alike", "denoise", "blind"),
    ("tiny", "full", "vision", "scale"),
    ("tiny_pi05", "masked differently", "denoise", "keys"),
]
WRONG_SLOWLY = [
    ("tiny", "masked alike", "prefill", "keys"),
    ("tiny", "masked differently", "prefill", "keys of other rows"),
]
FEW = ("workload.num_steps=1",)
VERIFIED = [("tiny", "workload=masked", "workload.batch_size=3"), ("tiny_pi05",)]


# ---- the process that interprets


def error(model: str, observation: str, option: Option, spoil: Callable[[Policy], None] = lambda policy: None) -> float:
    """The largest relative L2 error of the actions in float32 against float64, over the rows of the observation."""
    given = tiny_observation(**OBSERVATIONS[observation])
    actions = []
    for precision, applied in ((FP32_TRUTH, Eager()), (FP32, option)):
        policy = tiny_policy(model == "tiny_pi05", precision, horizon=3, num_steps=2)
        policy.begin("attention")
        applied.apply(policy)
        if precision is FP32:
            spoil(policy)
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    return max(rel_l2(actions[1], actions[0]))


def spoiler(stage: str, fault: str) -> Callable[[Policy], None]:
    """Makes the kernel calls of a stage lose something."""

    def spoil(policy: Policy) -> None:
        def faulty(module: Attention) -> Any:
            assert isinstance(module.attend, partial)
            return partial(triton_attend, op=partial(FAULTS[fault], module.attend.keywords["op"]))

        policy.fill_each(Attention, "attend", faulty, (stage,), f"without {fault}")

    return spoil


def interpret(points: list[list[str]]) -> None:
    """Prints the error, or the verdict, of every point."""
    torch.set_num_threads(1)
    for kind, *point in points:
        found: Any
        if kind == "right":
            found = error(point[0], point[1], TritonAttention())
        elif kind == "wrong":
            model, observation, stage, fault = point
            found = error(model, observation, Eager(**{stage: TritonAttention()}), spoiler(stage, fault))
        else:
            model, *words = point
            found = built(subject_of(f"model={model}", "attention=triton", *FEW, *words)).verdict.wrong
        print(json.dumps([[kind, *point], found]), flush=True)


@pytest.fixture(scope="module")
def interpreted(request) -> dict[tuple[str, ...], Any]:
    return interpreter.of_points(request)


@interprets
@pytest.mark.timeout(2400)  # the first of these waits for the process in which all are interpreted
@pytest.mark.parametrize("point", points("right", RIGHT, RIGHT_SLOWLY))
def test_actions_are_the_same(point, interpreted):
    assert interpreted[point] <= FP32_LIMIT


@interprets
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("point", points("wrong", WRONG, WRONG_SLOWLY))
def test_what_a_kernel_call_loses_is_found(point, interpreted):
    assert interpreted[point] > FP32_LIMIT


@interprets
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("point", points("verified", [], VERIFIED))
def test_verified_in_bf16(point, interpreted):
    assert interpreted[point] == []


# ---- the option


def test_it_composes_for_all_stages_and_for_one():
    everywhere = config.stack(plain_config("attention=triton"))
    assert everywhere.attention == TritonAttention()
    one = config.stack(plain_config("attention=sdpa", "attention.denoise=triton")).attention
    assert isinstance(one, Sdpa)
    assert one.denoise == TritonAttention()
    other = config.stack(plain_config("attention=triton", "attention.vision=sdpa")).attention
    assert isinstance(other, TritonAttention)
    assert isinstance(other.vision, Sdpa)


@pytest.mark.parametrize(
    ("words", "group"), [(("attention=triton",), "attention"), (("attention.denoise=triton",), "attention.denoise")]
)
def test_it_needs_a_gpu_and_proves_itself(words, group):
    stack = config.stack(plain_config(*words))
    assert build.unmet(stack, Machine()) == [
        f"{group}: needs a GPU of nvidia or amd; this machine has no GPU that torch can use"
    ]
    assert build.proofs(stack) == [(group, "attend_kernel")]


def test_every_stage_gets_its_kernel():
    policy = tiny_policy()
    policy.begin("attention")
    TritonAttention().apply(policy)
    for stage, op in (("vision", attend_dense), ("prefill", attend_dense), ("denoise", attend_split)):
        assert all(module.attend.keywords["op"] is op for module in policy.instances(Attention, stage))


def test_two_warp_groups_are_the_prefills_of_one_observation(monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy()
    policy.begin("attention")
    with pytest.raises(UnsupportedError, match=r"two_groups=true is for one key/value head of 256; this model has 1"):
        TritonAttention(two_groups=True).apply(policy)
    monkeypatch.setattr(triton_attention, "HEAD_DIM", policy.model.config.head_dim)
    TritonAttention(two_groups=True).apply(policy)
    assert {one.attend.keywords["op"] for one in policy.instances(Attention, "prefill")} == {attend_by_batch}
    assert all(one.attend.keywords["op"] is attend_dense for one in policy.instances(Attention, "vision"))
    taken = []
    for module, name in ((attention_halves, "attend_halves"), (attention_dense, "attend_dense")):
        monkeypatch.setattr(module, name, lambda q, *given, name=name: taken.append((name, len(q))) or q)
    for batch in (1, 2):
        attend_by_batch(torch.zeros(batch, 3, 8, 256), *[torch.zeros(batch, 3, 1, 256)] * 2, None, False, 1.0)
    assert taken == [("attend_halves", 1), ("attend_dense", 2)]


def test_two_warp_groups_say_what_they_need():
    a100, h100 = (
        Machine(gpu=name, vendor="nvidia", arch=arch) for name, arch in (("A100", "sm_80"), ("H100", "sm_90"))
    )

    def unmet(machine: Machine, *words: str) -> list[str]:
        return build.unmet(config.stack(plain_config(*words)), machine)

    two = "attention=triton", "attention.two_groups=true"
    assert unmet(h100, *two) == []
    assert build.proofs(config.stack(plain_config(*two))) == [("attention", "attend_halves_kernel")]
    [reason] = unmet(a100, *two)
    assert reason == "attention: two_groups needs the architecture sm_90; this machine has A100 (sm_80)"
    assert unmet(a100, "attention=triton") == []
    [reason] = unmet(h100, "attention.vision={name: triton, two_groups: true}")
    assert reason == "attention.vision: two_groups is the prefill's: set it for that stage"
    assert unmet(h100, "attention.prefill={name: triton, two_groups: true}") == []
    [reason] = unmet(h100, *two, "precision=fp32")
    assert reason == "attention: two_groups is for bf16; this precision has none"


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("blind", [True, False])
def test_the_mask_reaches_the_kernel(full, blind):
    """Whole, and no more than is needed: no keys are read where the host knows that all are real."""
    calls = []
    q, keys = torch.zeros(1, 2, 1, 16), torch.ones(1, 5, dtype=torch.bool)
    mask = Mask(keys, 2, full=full, blind=blind)
    triton_attend(q, q, q, mask, 0.25, op=lambda *arguments: calls.append(arguments[3:]))
    assert calls == [(None if full else keys, blind, 0.25)]


def test_a_causal_mask_is_refused():
    mask = Mask(torch.ones(1, 5, dtype=torch.bool), 2, full=True, causal=True)
    with pytest.raises(AssertionError, match="causal"):
        triton_attend(torch.zeros(1, 2, 1, 16), torch.zeros(0), torch.zeros(0), mask, 1.0, op=lambda *arguments: None)


if __name__ == "__main__":
    interpret(json.loads(sys.argv[1]))
