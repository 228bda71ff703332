"""Models filled from a source, and how the random one behaves: attention that picks tokens, actions of order one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from pi0exp.model.config import CAMERAS, GemmaConfig, ModelConfig, VisionConfig, tiny
from pi0exp.model.layers import Attention, eager_attend
from pi0exp.model.mask import Mask
from pi0exp.model.names import parameter_shapes
from pi0exp.model.observation import Observation, observation_from_arrays
from pi0exp.model.pi0 import Pi0
from pi0exp.model.precision import BF16, BF16_TRUTH, FP32, FP32_TRUTH, Precision
from pi0exp.model.weights import build, random_source

KINDS = pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
STACKS = ("vision", "paligemma", "expert")


@cache
def random_model(config: ModelConfig, seed: int = 0, precision: Precision = FP32) -> Pi0:
    return build(config, precision, random_source(config, seed, "cpu"), "cpu")


def an_observation(config: ModelConfig, masks: tuple[bool, bool, bool] = (True, True, True)) -> Observation:
    """Pictures of coarse blocks and fine noise; 11 of 16 prompt tokens are real."""
    draw, size = np.random.default_rng(0), config.vision.image_size
    block = size // 8
    images = {}
    for name in CAMERAS:
        coarse = draw.integers(0, 256, (1, 8, 8, 3)).repeat(block, axis=1).repeat(block, axis=2)
        images[name] = (coarse + draw.normal(0, 20, coarse.shape)).clip(0, 255).astype(np.uint8)
    return observation_from_arrays(
        images,
        {name: np.array([mask]) for name, mask in zip(CAMERAS, masks, strict=True)},
        draw.normal(size=(1, config.action_dim)).astype(np.float32),
        draw.integers(3, config.vocab_size, (1, 16)),
        np.arange(16)[None] < 11,
        config=config,
        device="cpu",
    )


def some_noise(config: ModelConfig, horizon: int = 10) -> Tensor:
    return torch.randn(1, horizon, config.action_dim, generator=torch.Generator().manual_seed(0))


@contextmanager
def measured_logits(model: Pi0) -> Iterator[dict[str, list[float]]]:
    """Collects, per stack, the logits' standard deviation over the keys that a query may see, a mean for every call."""
    stds: dict[str, list[float]] = {stack: [] for stack in STACKS}

    def measuring(stack: str):
        def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float) -> Tensor:
            N, H = q_BTNH.shape[2:]
            k_BSNH = k_BSKH.repeat_interleave(N // k_BSKH.shape[2], dim=2)
            logits_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) * H**-0.5
            if mask is not None:
                # Rows of padded queries see the same keys as others here, and so do no harm to the mean.
                logits_BNTS = logits_BNTS.masked_fill(~mask.visible()[:, None], torch.nan)
            mean_BNT1 = logits_BNTS.nanmean(dim=-1, keepdim=True)
            stds[stack].append((logits_BNTS - mean_BNT1).square().nanmean(dim=-1).sqrt().mean().item())
            return eager_attend(q_BTNH, k_BSKH, v_BSKH, mask, scale)

        return attend

    slots = [(stack, m) for stack in STACKS for m in getattr(model, stack).modules() if isinstance(m, Attention)]
    for stack, module in slots:
        module.attend = measuring(stack)
    yield stds
    for _, module in slots:
        del module.attend


def logit_stds(model: Pi0, num_steps: int, horizon: int = 10) -> dict[str, float]:
    observation, noise = an_observation(model.config), some_noise(model.config, horizon)
    with measured_logits(model) as stds, torch.inference_mode():
        model.sample_actions(observation, noise, num_steps)
    return {stack: sum(values) / len(values) for stack, values in stds.items()}


def camera_effect(model: Pi0, num_steps: int = 10, horizon: int = 10) -> float:
    """How far the actions move, relative to their size, if one camera is masked. They are of order one."""
    noise = some_noise(model.config, horizon)
    with torch.inference_mode():
        seen, unseen = (
            model.sample_actions(an_observation(model.config, (True, mask, True)), noise, num_steps)
            for mask in (True, False)
        )
    assert seen.isfinite().all()
    assert 0.5 < seen.square().mean().sqrt() < 5
    return ((seen - unseen).norm() / seen.norm()).item()


# ---- building


@KINDS
@pytest.mark.parametrize("precision", [BF16, FP32, BF16_TRUTH, FP32_TRUTH], ids=["bf16", "fp32", "bf16t", "fp32t"])
def test_build_fills_everything_as_the_precision_says(pi05: bool, precision: Precision) -> None:
    config = tiny(pi05)
    asked: list[str] = []
    source = random_source(config, 0, "cpu")

    def counting(name: str, shape: tuple[int, ...]) -> Tensor:
        asked.append(name)
        return source(name, shape)

    model = build(config, precision, counting, "cpu")
    shapes = parameter_shapes(config)
    assert asked == list(shapes)
    assert not model.training
    assert model.rope.inv_freq.device.type == "cpu"
    for name, value in model.named_parameters():
        assert value.device.type == "cpu"
        assert not value.requires_grad
        assert value.dtype == precision.dtype_of(name), name
        assert torch.equal(value, precision.convert(name, source(name, shapes[name]))), name


def test_build_refuses_a_wrong_shape() -> None:
    with pytest.raises(AssertionError, match=r"vision\.position is \[3\], not \[16, 144\]"):
        build(tiny(), FP32, lambda name, shape: torch.zeros(3), "cpu")


# ---- random parameters


@KINDS
def test_random_parameters_depend_on_seed_and_name_only(pi05: bool) -> None:
    config = tiny(pi05)
    shapes = parameter_shapes(config)
    one, other, third = (random_source(config, seed, "cpu") for seed in (0, 0, 1))
    values = {name: one(name, shape) for name, shape in shapes.items()}
    for name, shape in reversed(shapes.items()):
        assert torch.equal(other(name, shape), values[name]), name
        assert not torch.equal(third(name, shape), values[name]), name
        assert values[name].dtype == torch.float32
        assert values[name].std() > 0.01, name
    gate, up = (values[f"paligemma.blocks.0.mlp.{part}.weight"] for part in ("gate", "up"))
    assert not torch.equal(gate, up)


def test_gates_let_every_branch_through() -> None:
    config = tiny(pi05=True)
    bias = random_source(config, 0, "cpu")("expert.blocks.0.norm1.dense.bias", (96,))
    assert bias[:64].abs().max() < 0.3
    assert (bias[64:] - 1).abs().max() < 0.3


@KINDS
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_attention_picks_tokens_and_actions_follow(pi05: bool, seed: int) -> None:
    model = random_model(tiny(pi05), seed)
    for stack, std in logit_stds(model, num_steps=10).items():
        assert 2.0 <= std <= 3.0, (stack, std)
    assert camera_effect(model) > 0.02


@KINDS
def test_depth_does_not_flatten_attention(pi05: bool) -> None:
    config = replace(
        tiny(pi05),
        vision=replace(tiny().vision, depth=27),
        paligemma=replace(tiny().paligemma, depth=18),
        expert=replace(tiny().expert, depth=18),
    )
    model = random_model(config)
    for stack, std in logit_stds(model, num_steps=1).items():
        assert 2.0 <= std <= 3.0, (stack, std)
    assert camera_effect(model) > 0.02


@pytest.mark.slow
@KINDS
def test_full_width_of_two_layers(pi05: bool) -> None:
    config = ModelConfig(
        pi05=pi05,
        vision=VisionConfig(depth=2),
        paligemma=GemmaConfig(width=2048, depth=2, mlp_dim=16384),
        expert=GemmaConfig(width=1024, depth=2, mlp_dim=4096),
        vocab_size=1024,
    )
    model = build(config, FP32, random_source(config, 0, "cpu"), "cpu")
    for stack, std in logit_stds(model, num_steps=1, horizon=50).items():
        assert 2.0 <= std <= 3.0, (stack, std)
    assert camera_effect(model, num_steps=3, horizon=50) > 0.02
