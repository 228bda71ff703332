"""fusion=blocks on the tiny models, under Triton's interpreter; `test_kernels` has the kernels themselves.

TRITON_INTERPRET decides when a kernel's file is imported, so the interpreter has a process of its own: this file run as
a script, which prints a line of JSON for each point.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import triton
from golden import load_model, noise_of, num_steps_of, observation_of
from helpers import built, noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from packaging.version import Version
from torch import Tensor

from pi0exp import build, config
from pi0exp.fusion import blocks
from pi0exp.fusion.fusion import Fusion
from pi0exp.machine import Machine
from pi0exp.model.pi0 import Context, plain_step
from pi0exp.model.precision import BF16, BF16_TRUTH, FP32, FP32_TRUTH
from pi0exp.option import Numerics
from pi0exp.policy import Policy
from pi0exp.verify import FP32_LIMIT, judge, rel_l2

# Up to 2.3 numpy takes an array of one value for a number, on which older interpreters count in loops.
interprets = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason=f"the interpreter of triton {triton.__version__} needs numpy < 2.4",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; none is here")

OBSERVATIONS = {
    "full": {"lengths": (8,)},
    "no prompt": {"lengths": (0,)},
    "masked differently": {"cameras": ((1, 1, 1), (1, 0, 1)), "lengths": (8, 3)},
}
HORIZONS = {"full": 3, "no prompt": 1, "masked differently": 2}
RIGHT = [(model, observation) for model in ("tiny", "tiny_pi05") for observation in OBSERVATIONS]
GOLDEN = ("tiny_pi0_bf16", "tiny_pi05_bf16")
VERIFIED = [(model, *words) for model in ("tiny", "tiny_pi05") for words in ((), ("workload=masked",))]


def fusion() -> Fusion:
    option = config.stack(plain_config("fusion=blocks")).fusion
    assert isinstance(option, Fusion)
    return option


def streamed(policy: Policy) -> Policy:
    policy.begin("fusion")
    with torch.no_grad():
        fusion().apply(policy)
    return policy


# ---- what a step may lose


def wrong_norm(policy: Policy) -> None:
    """The second norm's weights in the place of the first's."""
    block = policy.model.expert.blocks[1]
    block.norm1.weight = block.norm2.weight


def wrong_offset(policy: Policy) -> None:
    """The shifts' share of the products of a layer is forgotten."""
    policy.model.moments[:, -1] = 0.0
    policy.model.moments[:, -200:] = 0.0


def wrong_room(policy: Policy) -> None:
    """A layer reads the keys and values of its neighbour."""

    def step(model: Any, x: Tensor, moment: Tensor, context: Context) -> Tensor:
        return real(model, x, moment, context._replace(cache=[context.cache[0], context.cache[0], context.cache[2]]))

    real, policy.model.step = policy.model.step, step


def forgets_masks(policy: Policy) -> None:
    def step(model: Any, x: Tensor, moment: Tensor, context: Context) -> Tensor:
        return real(model, x, moment, context._replace(full=True))

    real, policy.model.step = policy.model.step, step


FAULTS: dict[str, Callable[[Policy], None]] = {
    "norm": wrong_norm,
    "offset": wrong_offset,
    "room": wrong_room,
    "masks": forgets_masks,
}
WRONG = [("tiny", "full", "norm"), ("tiny_pi05", "full", "offset"), ("tiny", "full", "room"),
         ("tiny", "masked differently", "masks")]  # fmt: skip


# ---- the process that interprets


def error(model: str, observation: str, spoil: Callable[[Policy], None] = lambda policy: None) -> float:
    """The largest relative L2 error of the actions in float32 against float64, over the rows of the observation."""
    given, actions = tiny_observation(**OBSERVATIONS[observation]), []
    for precision in (FP32_TRUTH, FP32):
        policy = tiny_policy(model == "tiny_pi05", precision, horizon=HORIZONS[observation], num_steps=2)
        if precision is FP32:
            spoil(streamed(policy))
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    return max(rel_l2(actions[1], actions[0]))


def golden(case: str) -> list[str]:
    """What is wrong with the actions for the original's weights and inputs, in bfloat16."""
    actions = []
    for precision, changed in ((BF16, True), (BF16, False), (BF16_TRUTH, False)):
        policy = Policy(load_model(case, precision), noise_of(case).shape[1], num_steps_of(case))
        policy = streamed(policy) if changed else policy
        actions.append([policy.sample_actions(observation_of(case), noise_of(case))])
    return judge(*actions, Numerics.REORDERED, "bf16").wrong


def repeated() -> bool:
    """Whether the same inputs give the same bits, with another input between."""
    policy = streamed(tiny_policy(precision=BF16, horizon=2, num_steps=1))
    one, other = tiny_observation(), tiny_observation(seed=1)
    first = policy.sample_actions(one, noise_for(policy, one))
    policy.sample_actions(other, noise_for(policy, other))
    return torch.equal(first, policy.sample_actions(one, noise_for(policy, one)))


def many_rows() -> float:
    """The error where there are more rows than a stream takes: 2 x 33."""
    given, actions = tiny_observation([(1, 1, 1)] * 2, (5, 8)), []
    for precision in (FP32_TRUTH, FP32):
        policy = tiny_policy(True, precision, horizon=33, num_steps=1)
        if precision is FP32:
            streamed(policy)
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    return max(rel_l2(actions[1], actions[0]))


def interpret(points: list[list[str]]) -> None:
    """Prints what came of every point."""
    torch.set_num_threads(1)
    for kind, *point in points:
        found: Any
        if kind == "right":
            found = error(*point)
        elif kind == "wrong":
            found = error(point[0], point[1], FAULTS[point[2]])
        elif kind == "golden":
            found = golden(*point)
        elif kind == "verified":
            words = ("fusion=blocks", "workload.num_steps=2", "workload.horizon=2", *point[1:])
            found = built(subject_of(f"model={point[0]}", *words)).verdict.wrong
        else:
            found = {"repeated": repeated, "many rows": many_rows}[kind]()
        print(json.dumps([[kind, *point], found]), flush=True)


@pytest.fixture(scope="module")
def interpreted(request) -> dict[tuple[str, ...], Any]:
    """(kind, *point) -> what came of it, of the points whose tests were asked for."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    points = [list(item.callspec.params["point"]) for item in own if "point" in item.callspec.params]
    repository = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(points)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr
    return {tuple(point): found for point, found in map(json.loads, done.stdout.splitlines())}


@interprets
@pytest.mark.parametrize("point", [*(("right", *point) for point in RIGHT), ("many rows",)], ids=" ".join)
def test_actions_are_the_same(point, interpreted):
    assert interpreted[point] <= FP32_LIMIT


@interprets
@pytest.mark.parametrize("point", [("wrong", *point) for point in WRONG], ids=" ".join)
def test_what_a_step_loses_is_found(point, interpreted):
    assert interpreted[point] > FP32_LIMIT


@interprets
@pytest.mark.parametrize("point", [("repeated",)], ids=" ".join)
def test_equal_inputs_give_equal_bits(point, interpreted):
    assert interpreted[point] is True


@interprets
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "point", [*(("golden", case) for case in GOLDEN), *(("verified", *point) for point in VERIFIED)], ids=" ".join
)
def test_bf16_stays_within_the_bound(point, interpreted):
    assert interpreted[point] == []


if __name__ == "__main__":
    interpret(json.loads(sys.argv[1]))
