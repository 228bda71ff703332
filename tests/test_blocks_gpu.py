"""fusion=blocks on a GPU, on models of full width with two layers a stage and on the golden data. What a CPU can show
stands in `test_blocks`."""

import random
from collections.abc import Iterator

import pytest
import torch
from golden import BF16_CASES, config_of, load_model, noise_of, num_steps_of, observation_of, outputs_of
from helpers import plain_config, tiny_observation
from torch import Tensor

from pi0exp import build, config, subject
from pi0exp.fusion import blocks
from pi0exp.kernels.skinny_gemm import MAX_ROWS
from pi0exp.model.precision import BF16
from pi0exp.option import Numerics
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicySubject
from pi0exp.subject import Verdict
from pi0exp.verify import SINGLE_RATIO, judge, rel_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
GROUPS, DRAWS = 20, 10
"""Models and horizons, and observations of each: 200 draws."""


@pytest.fixture(autouse=True)
def _all_that_the_kernels_take_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call streams fewer rows, since more are slower; the plain step is what even more rows take here."""
    monkeypatch.setattr(blocks, "STREAMED", MAX_ROWS)


def shallow(*words: str) -> PolicySubject:
    made = subject.subject(plain_config(*SHALLOW, *words))
    assert isinstance(made, PolicySubject)
    return made


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_observation(group: int):
    check_observations(group, "stack=9_blocks", horizons=50, batches=4)


@pytest.mark.parametrize("words", ["stack=10_persistent", "stack=11_hopper"])
@pytest.mark.parametrize("group", range(GROUPS, GROUPS + 6))
def test_any_observation_in_one_launch(words: str, group: int):
    check_observations(group, words, horizons=15, batches=1)


@pytest.mark.parametrize("group", range(GROUPS + 6, GROUPS + 18))
def test_any_observation_in_one_launch_of_many_rows(group: int):
    check_observations(group, "stack=11_hopper", horizons=63, batches=1)


def check_observations(group: int, words: str, horizons: int, batches: int) -> None:
    """Cameras of each row, lengths of prompts from 0 to 200, batch and horizon: as close to the truth as
    plain bf16, allowed REORDERED's factor, on every row."""
    draw, device = random.Random(group), torch.device("cuda", 0)
    horizon, model = draw.randint(1, horizons), ("pi0", "pi05")[group % 2]
    made = shallow(*words.split(), f"model={model}", f"workload.horizon={horizon}", "workload.num_steps=2")
    plain, truth = (made.plain_policy(one, device) for one in (made.precision.model, made.precision.truth))
    policy = made.policy(device)
    for _ in range(DRAWS):
        batch, seed = draw.randint(1, batches), draw.randrange(2**31)
        cameras = [[draw.random() < 0.7 for _ in range(3)] for _ in range(batch)]
        for row in cameras:
            row[draw.randrange(3)] = True
        lengths = [draw.choice((0, 200, draw.randint(0, 200))) for _ in range(batch)]
        given = tiny_observation(cameras, lengths, 200, seed, made.dimensions).to(device)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(batch, horizon, made.dimensions.action_dim, generator=generator, device=device)
        found, own, exact = (one.sample_actions(given, noise) for one in (policy, plain, truth))
        for error, base in zip(rel_l2(found, exact), rel_l2(own, exact), strict=True):
            assert error <= SINGLE_RATIO * base, (model, horizon, cameras, lengths, seed)


@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize(
    ("stack", "horizon"),
    [(stack, horizon) for stack in ("9_blocks", "10_persistent", "11_hopper", "12_tuned") for horizon in (10, 50)],
)
def test_verified(model: str, stack: str, horizon: int):
    for workload in ("default", "masked"):
        words = (*f"stack={stack}".split(), f"model={model}", f"workload={workload}", f"workload.horizon={horizon}")
        assert shallow(*words).build(torch.device("cuda", 0), 8, lambda text: None).verdict.wrong == []


# ---- the golden data


def golden_pieces(model: str) -> Iterator[tuple[str, slice]]:
    """The model's cases, and rows of each that a stream can take together: all of them, or one by one."""
    for case in BF16_CASES:
        if config_of(case).pi05 == (model == "pi05"):
            batch, tokens, _ = noise_of(case).shape
            tokens += config_of(case).suffix_prelude
            together = batch if batch * tokens <= MAX_ROWS else 1
            yield from ((case, slice(row, row + together)) for row in range(0, batch, together))


def golden_actions(model: str, device: torch.device, *words: str) -> list[Tensor]:
    """Actions in bf16 of the stack that the words choose, for every piece."""
    stack, actions = config.stack(plain_config(*words)), []
    for case, rows in golden_pieces(model):
        noise_BCA = noise_of(case)[rows].to(device)
        policy = Policy(load_model(case, BF16).to(device), noise_BCA.shape[1], num_steps_of(case))
        for _ in build.apply_stack(policy, stack):
            pass
        actions.append(policy.sample_actions(observation_of(case, rows).to(device), noise_BCA).cpu())
    return actions


def golden_verdict(model: str, device: torch.device, *words: str) -> Verdict:
    """Held against the plain model on the same device. The truth is the original's own, in float32 arithmetic."""
    truth = [outputs_of(case)["actions_float32"][rows] for case, rows in golden_pieces(model)]
    found, plain = golden_actions(model, device, *words), golden_actions(model, device)
    return judge(found, plain, truth, Numerics.REORDERED, "bf16")


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_golden_observations(model: str, monkeypatch: pytest.MonkeyPatch):
    """Absent cameras and padded prompts, some rows of a batch masked differently, with the weights of the original."""

    def too_many_rows(*given: object) -> Tensor:
        raise AssertionError("this was the plain step, not a stream")

    monkeypatch.setattr(blocks, "plain_step", too_many_rows)
    verdict = golden_verdict(model, torch.device("cuda", 0), "fusion=blocks")
    assert verdict.wrong == []
    assert verdict.metrics["error/ratio_mean"] != 1, "the blocks were not in the way"
