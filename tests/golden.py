"""The golden data: what the original computes for small models, how close we must come, and how to look inside.

A case is named as in `manifest.json`. What the arrays are, and where the limits come from: `data/golden/README.md`.

Shapes: B batch, S prefix tokens, R stored prefix tokens, T suffix tokens, K key/value heads, H head dim.
"""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pi0exp.model.config import CAMERAS, GemmaConfig, ModelConfig, VisionConfig
from pi0exp.model.names import openpi_name
from pi0exp.model.observation import Observation, observation_from_arrays
from pi0exp.model.pi0 import Context, Pi0
from pi0exp.model.precision import FP32, Precision

ROOT = Path(__file__).parent / "data" / "golden"
CASES = {case["name"]: case for case in json.loads((ROOT / "manifest.json").read_text())["cases"]}
FP32_CASES = [name for name in CASES if name.endswith("_fp32")]
BF16_CASES = [name for name in CASES if name.endswith("_bf16")]

LIMITS = {
    "actions": (4e-5, 1e-4),
    "x": (4e-5, 1e-4),
    "v": (1.2e-4, 2e-4),
    "image_embeds": (5e-5, 4e-4),
    "prefix_embeds": (5e-5, 4e-4),
    "prefix_k": (5e-5, 4e-4),
    "prefix_v": (5e-5, 4e-4),
    "suffix_embeds": (2e-5, 1e-4),
    "adarms_cond": (2e-5, 1e-4),
}
"""Largest absolute difference allowed in float32, (tiny, geometry), by the name up to the dot: between what other
orders of summation do and what the smallest known mistake does. Every other array must be equal."""

# The data was made on one thread, and tensors this small are fastest there.
torch.set_num_threads(1)


def config_of(case: str) -> ModelConfig:
    config = CASES[case]["config"]
    vision, paligemma, expert = config["vision"], config["paligemma"], config["expert"]
    return ModelConfig(
        pi05=config["model"] == "pi05",
        vision=VisionConfig(
            width=vision["width"],
            depth=vision["depth"],
            num_heads=vision["heads"],
            mlp_dim=vision["mlp"],
            image_size=config["image_size"],
            patch_size=config["patch_size"],
        ),
        paligemma=GemmaConfig(paligemma["width"], paligemma["depth"], paligemma["mlp"]),
        expert=GemmaConfig(expert["width"], expert["depth"], expert["mlp"]),
        num_heads=config["heads"],
        num_kv_heads=config["kv_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab"],
        action_dim=config["action_dim"],
    )


def num_steps_of(case: str) -> int:
    return int(CASES[case]["config"]["num_steps"])


def load_model(case: str, precision: Precision = FP32) -> Pi0:
    """A fresh model with the case's weights, for the caller to keep or to break."""
    model, weights = Pi0(config_of(case), precision), _load(CASES[case]["weights"])
    # Cloned: `convert` may hand back the cached tensor itself.
    state = {name: precision.convert(name, weights[openpi_name(name)]).clone() for name, _ in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def observation_of(case: str, rows: slice = slice(None)) -> Observation:
    given = {name: array[rows] for name, array in _load(CASES[case]["inputs"]).items()}
    return observation_from_arrays(
        {camera: given[f"images.{camera}"].numpy() for camera in CAMERAS},
        {camera: given[f"image_masks.{camera}"].numpy() for camera in CAMERAS},
        given["state"].numpy(),
        given["tokenized_prompt"].numpy(),
        given["tokenized_prompt_mask"].numpy(),
        config=config_of(case),
        device="cpu",
    )


def noise_of(case: str) -> Tensor:
    return _load(CASES[case]["inputs"])["noise"]


def outputs_of(case: str) -> dict[str, Tensor]:
    return _load(CASES[case]["outputs"])


@cache
def _load(path: str) -> dict[str, Tensor]:
    return load_file(ROOT / path)


def rel_l2(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, summed in float64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def bf16_ratio(case: str, actions_BCA: Tensor) -> float:
    """The error of bf16 actions against float32 arithmetic on the same weights, as a multiple of the original's own."""
    want = outputs_of(case)
    return rel_l2(actions_BCA, want["actions_float32"]) / rel_l2(want["actions"], want["actions_float32"])


def limit_of(case: str, name: str) -> float | None:
    """The largest difference allowed, None where the array must be equal."""
    limits = LIMITS.get(name.split(".")[0])
    return None if limits is None else limits[case.startswith("geometry")]


def comparable(case: str, name: str, got: Tensor) -> tuple[Tensor, Tensor]:
    """Our array and the stored one, cut down to what both have and what matters.

    Of arrays over prefix tokens only some rows are stored. Keys and values, ours [B, S, K, H] and stored [B, K, R, H],
    count only at real tokens: no real token ever reads the others.
    """
    outputs, kind = outputs_of(case), name.split(".")[0]
    want = outputs[name]
    if kind in ("prefix_embeds", "prefix_attention_mask", "prefix_k", "prefix_v"):
        got = got[:, outputs["prefix_rows"]]
    if kind in ("prefix_k", "prefix_v"):
        valid_BR = outputs["prefix_pad_mask"][:, outputs["prefix_rows"]]
        got, want = got[valid_BR], want.transpose(1, 2)[valid_BR]
    return got, want


def check(case: str, name: str, got: Tensor) -> None:
    """Fail unless `got` is the stored array `name`, within its limit."""
    got, want = comparable(case, name, got)
    limit = limit_of(case, name)
    assert got.shape == want.shape, f"{case} {name}: shape {list(got.shape)}, stored {list(want.shape)}"
    assert got.dtype == want.dtype, f"{case} {name}: {got.dtype}, stored {want.dtype}"
    if limit is None:
        assert torch.equal(got, want), f"{case} {name}: {int((got != want).sum())} of {want.numel()} elements differ"
    else:
        difference = (got - want).abs().max().item()
        assert difference <= limit, f"{case} {name}: off by {difference:.2g}, limit {limit:.2g}"


def failures(case: str, got: dict[str, Tensor]) -> list[str]:
    """The names of the stored arrays that `got`, from `trace`, does not reproduce; a missing one is a failure too."""
    failed = []
    for name in outputs_of(case):
        if name == "prefix_rows":  # says which rows are stored
            continue
        try:
            check(case, name, got[name])
        except (AssertionError, KeyError):
            failed.append(name)
    return failed


@torch.inference_mode()
def trace(model: Pi0, observation: Observation, noise_BCA: Tensor, num_steps: int) -> dict[str, Tensor]:
    """Run `sample_actions` and collect what passes between the model's parts, under the names of the golden data."""
    calls: dict[str, list] = defaultdict(list)
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    denoise_step = model.denoise_step

    def spy_step(x_BCA: Tensor, time_B: Tensor, context: Context) -> Tensor:
        v_BCA = denoise_step(x_BCA, time_B, context)
        steps.append((x_BCA, time_B, context.valid_BS, v_BCA))
        return v_BCA

    def spy(name: str) -> object:
        def record(_module: nn.Module, args: tuple, output: object) -> None:
            calls[name].append((args, output))

        return getattr(model, name).register_forward_hook(record)

    hooks = [spy(name) for name in ("vision", "rope", "paligemma", "expert")]
    with patch.object(model, "denoise_step", spy_step):
        actions_BCA = model.sample_actions(observation, noise_BCA, num_steps)
    for hook in hooks:
        hook.remove()

    x_NBCA, time_NB, valid_NBS, v_NBCA = (list(column) for column in zip(*steps, strict=True))
    (prefix_BSD, _, prefix_mask, *_), (_, caches) = calls["paligemma"][0]
    positions = [args[0] for args, _ in calls["rope"]]
    found = {
        "actions": actions_BCA,
        "x": torch.stack([*x_NBCA[1:], actions_BCA]),
        "v.first": v_NBCA[0],
        "v.last": v_NBCA[-1],
        "timesteps": torch.stack([time_B[0] for time_B in time_NB]),
        "prefix_embeds": prefix_BSD,
        "prefix_pad_mask": valid_NBS[0],
        "prefix_attention_mask": prefix_mask.dense(),
        "prefix_position_ids": positions[0],
        "suffix_position_ids": positions[1],
        "suffix_attention_mask": calls["expert"][0][0][2].dense(),
    }
    found |= {
        f"image_embeds.{camera}": output
        for camera, (_, output) in zip(observation.images, calls["vision"], strict=True)
    }
    for which, (k_BSKH, v_BSKH, _) in (("first", caches[0]), ("last", caches[-1])):
        found |= {f"prefix_k.{which}": k_BSKH, f"prefix_v.{which}": v_BSKH}
    suffixes = {
        which: (calls["expert"][i][0][0], calls["expert"][i][0][4]) for which, i in (("first", 0), ("last", -1))
    }
    # Needs no loop: the noise at a time late in it.
    tenth_B = torch.full((observation.batch_size,), 0.1)
    suffixes["tenth"] = model.embed_suffix(noise_BCA.to(model.precision.outside), tenth_B, observation.state_BA)
    for which, (suffix_BTD, cond_BD) in suffixes.items():
        found[f"suffix_embeds.{which}"] = suffix_BTD
        if cond_BD is not None:
            found[f"adarms_cond.{which}"] = cond_BD
    return found
