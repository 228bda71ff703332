"""The golden tests can fail: every known mistake, made on purpose, is caught.

How much a mistake changes the actions of each case stands in the tables of `data/golden/README.md`. Each mistake below
bears the name of its row there and must change the actions by that much, or it would not be the mistake that is meant.

Shapes: B batch, S prefix tokens, L prompt tokens, T suffix tokens, C action horizon, D width.
"""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from statistics import geometric_mean

import pytest
import torch
import torch.nn.functional as F
from golden import (
    BF16_CASES,
    FP32_CASES,
    ROOT,
    bf16_ratio,
    failures,
    load_model,
    noise_of,
    num_steps_of,
    observation_of,
    outputs_of,
    rel_l2,
    trace,
)
from torch import Tensor, nn

from pi0exp.model import gemma, layers, pi0
from pi0exp.model.config import CAMERAS
from pi0exp.model.gemma import GemmaAttention
from pi0exp.model.layers import AdaRMSNorm, GatedMlp, RMSNorm, add_branch, eager_attend, plain_normalize, rotate
from pi0exp.model.mask import Mask, prefix_mask, suffix_mask
from pi0exp.model.observation import Observation
from pi0exp.model.pi0 import Pi0, prefix_positions, step_size, suffix_positions, time_embedding, timesteps
from pi0exp.model.precision import BF16, FP32
from pi0exp.model.siglip import VisionMlp

Patch = Callable[[object, str, object], None]
Mistake = Callable[[Patch, Pi0, Observation], Observation | None]
"""Breaks the model, or the functions it calls by way of `patch`, or returns another observation."""

BASE, LEFT, RIGHT = CAMERAS
MISTAKES: dict[str, Mistake] = {}


def mistake(name: str) -> Callable[[Mistake], Mistake]:
    def enter(function: Mistake) -> Mistake:
        MISTAKES[name] = function
        return function

    return enter


def fill(patch: Patch, model: nn.Module, kind: type[nn.Module], slot: str, value: object) -> None:
    for module in model.modules():
        if isinstance(module, kind):
            patch(module, slot, value)


def then(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """`module` goes on to return `change` of its output."""
    module.register_forward_hook(lambda _module, _args, output: change(output))


def last_real(valid_BS: Tensor) -> Tensor:
    """One-hot bool [B, S]: the last real token of every row."""
    index_B = (valid_BS * torch.arange(valid_BS.shape[1])).argmax(dim=1)
    return F.one_hot(index_B, valid_BS.shape[1]).bool()


def seeing(mask: Mask, change: Callable[[Tensor], Tensor]) -> Mask:
    """`mask` with other bits [B, T, S]."""
    visible_BTS = change(mask.visible())
    mask.visible = lambda: visible_BTS
    return mask


# ---- inputs


def with_prompt(observation: Observation, mask_BL: Tensor) -> Observation:
    return replace(observation, prompt_mask_BL=mask_BL, prompt_lengths=tuple(mask_BL.sum(dim=1).tolist()))


def with_camera(observation: Observation, camera: str) -> Observation:
    """`camera` present where it was absent and the other way round."""
    masks = observation.camera_masks | {camera: ~observation.camera_masks[camera]}
    present = observation.cameras_present | {camera: tuple(masks[camera].tolist())}
    return replace(observation, camera_masks=masks, cameras_present=present)


@mistake("hide last prompt token")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return with_prompt(given, given.prompt_mask_BL & ~last_real(given.prompt_mask_BL))


@mistake("show first padding token")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return with_prompt(given, given.prompt_mask_BL | last_real(given.prompt_mask_BL).roll(1, dims=1))


@mistake("flip camera 0")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return with_camera(given, BASE)


@mistake("flip camera 1")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return with_camera(given, LEFT)


@mistake("flip camera 2")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return with_camera(given, RIGHT)


@mistake("first prompt token + 1")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return replace(given, prompt_BL=given.prompt_BL + F.one_hot(torch.tensor(0), given.prompt_padded))


@mistake("swap wrist images")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return replace(given, images=given.images | {LEFT: given.images[RIGHT], RIGHT: given.images[LEFT]})


@mistake("wrist cameras swapped (with their masks)")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    def swapped(of: dict) -> dict:
        return of | {LEFT: of[RIGHT], RIGHT: of[LEFT]}

    return replace(
        given,
        images=swapped(given.images),
        camera_masks=swapped(given.camera_masks),
        cameras_present=swapped(given.cameras_present),
    )


@mistake("BGR")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return replace(given, images={camera: image_BHWC.flip(3) for camera, image_BHWC in given.images.items()})


@mistake("state + 0.5")
def _(patch: Patch, model: Pi0, given: Observation) -> Observation:
    return replace(given, state_BA=given.state_BA + 0.5)


# ---- masks


@mistake("no masks at all")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_prefix", lambda valid, full: prefix_mask(torch.ones_like(valid), True))
    patch(model, "mask_suffix", lambda valid, T, full, blind: suffix_mask(torch.ones_like(valid), T, True, False))


@mistake("prefix attends to padding and absent cameras")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_prefix", lambda valid, full: prefix_mask(torch.ones_like(valid), True))


@mistake("steps attend to padding and absent cameras")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_suffix", lambda valid, T, full, blind: suffix_mask(torch.ones_like(valid), T, True, blind))


@mistake("causal mask in the prefix")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_prefix", lambda valid, full: seeing(prefix_mask(valid, full), torch.tril))


@mistake("causal mask among actions")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def causal(valid_BS: Tensor, tokens: int, full: bool, blind: bool) -> Mask:
        return seeing(suffix_mask(valid_BS, tokens, full, blind), lambda seen: seen.tril(valid_BS.shape[1]))

    patch(model, "mask_suffix", causal)


@mistake("pi0: state token sees the actions")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_suffix", lambda valid, T, full, blind: suffix_mask(valid, T, full, False))


@mistake("last valid prefix token hidden from the prefix")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def narrowed(valid_BS: Tensor, full: bool) -> Mask:
        return seeing(prefix_mask(valid_BS, full), lambda seen: seen & ~last_real(valid_BS)[:, None, :])

    patch(model, "mask_prefix", narrowed)


@mistake("last valid prefix token hidden from the suffix")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(model, "mask_suffix", lambda valid, T, full, blind: suffix_mask(valid & ~last_real(valid), T, full, blind))


# ---- positions


@mistake("prompt positions + 1")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "prefix_positions", lambda valid: prefix_positions(valid) + in_prompt(valid, given))


def in_prompt(valid_BS: Tensor, observation: Observation) -> Tensor:
    return torch.arange(valid_BS.shape[1]) >= valid_BS.shape[1] - observation.prompt_padded


@mistake("position of the last valid prefix token + 1")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "prefix_positions", lambda valid: prefix_positions(valid) + last_real(valid))


@mistake("prefix positions 0..S-1 (steps start at the count of valid tokens)")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "prefix_positions", lambda valid: prefix_positions(torch.ones_like(valid)))


@mistake("prefix positions 0..S-1, steps start at S")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "prefix_positions", lambda valid: prefix_positions(torch.ones_like(valid)))
    patch(pi0, "suffix_positions", lambda valid, T: suffix_positions(torch.ones_like(valid), T))


@mistake("steps start at S")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "suffix_positions", lambda valid, T: suffix_positions(torch.ones_like(valid), T))


@mistake("steps start at 0")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "suffix_positions", lambda valid, T: suffix_positions(torch.zeros_like(valid), T))


@mistake("suffix positions - 1")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "suffix_positions", lambda valid, T: suffix_positions(valid, T) - 1)


# ---- RoPE, attention, cache


@mistake("RoPE pairs (2i, 2i+1)")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def interleaved(x_BTNH: Tensor, cos_BT1F: Tensor, sin_BT1F: Tensor) -> Tensor:
        pairs_first = x_BTNH.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return rotate(pairs_first, cos_BT1F, sin_BT1F).unflatten(-1, (2, -1)).mT.flatten(-2)

    patch(gemma, "rotate", interleaved)


@mistake("RoPE also on V")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    for attention in (module for module in model.modules() if isinstance(module, GemmaAttention)):
        rotation: list[tuple[Tensor, Tensor]] = []
        attention.register_forward_pre_hook(lambda _module, args, rotation=rotation: rotation.append(args[1]))
        then(attention.v, lambda v_BTH, rotation=rotation: rotate(v_BTH[:, :, None], *rotation[-1])[:, :, 0])


@mistake("bf16-rounded RoPE frequencies in fp32")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    model.rope.inv_freq = model.rope.inv_freq.bfloat16().float()


@mistake("attention scale 2 % off")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(patch, model, GemmaAttention, "attend", lambda q, *rest: eager_attend(1.02 * q, *rest))


@mistake("cache layers shifted by one")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def shifted(*args: object, prefill: Callable = model.prefill) -> list:
        cache = prefill(*args)
        return cache[1:] + cache[:1]

    patch(model, "prefill", shifted)


# ---- norms


@mistake("RMSNorm w instead of 1 + w")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(
        patch,
        model,
        RMSNorm,
        "normalize",
        lambda x, branch, gate, scale, *rest: plain_normalize(x, branch, gate, scale - 1, *rest),
    )


@mistake("all eps 1e-5 instead of 1e-6")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    for kind in (nn.LayerNorm, RMSNorm, AdaRMSNorm):
        fill(patch, model, kind, "eps", 1e-5)


@mistake("adaRMS scale and shift swapped")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(
        patch,
        model,
        AdaRMSNorm,
        "normalize",
        lambda x, b, g, scale, shift, eps: plain_normalize(x, b, g, shift, scale, eps),
    )


@mistake("adaRMS scale instead of 1 + scale")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(
        patch,
        model,
        AdaRMSNorm,
        "normalize",
        lambda x, branch, gate, scale, *rest: plain_normalize(x, branch, gate, scale - 1, *rest),
    )


@mistake("adaRMS 1 + gate")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(layers, "add_branch", lambda x, branch, gate: add_branch(x, branch, None if gate is None else 1 + gate))


@mistake("adaRMS without gate")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(layers, "add_branch", lambda x, branch, gate: add_branch(x, branch, None))


# ---- vision and text


@mistake("text not scaled")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    then(model.embedding, lambda text_BLD: text_BLD / sqrt(model.config.paligemma.width))


@mistake("text scale rounded to bf16")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    scale = sqrt(model.config.paligemma.width)
    then(model.embedding, lambda text_BLD: text_BLD * (torch.tensor(scale).bfloat16().item() / scale))


@mistake("image embeddings / sqrt(width)")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    then(model.vision, lambda image_BPD: image_BPD / sqrt(model.config.paligemma.width))


@mistake("patches in column order")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    then(model.vision.patch, lambda patches_BDhw: patches_BDhw.mT)


@mistake("no position embedding")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    model.vision.position.zero_()


@mistake("no post_layernorm")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def summed(x_BPD: Tensor, branch_BPD: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return x_BPD + branch_BPD, x_BPD + branch_BPD

    patch(model.vision.norm, "normalize", summed)


@mistake("erf GELU in SigLIP")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(patch, model, VisionMlp, "activate", F.gelu)


@mistake("erf GELU in Gemma")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    fill(patch, model, GatedMlp, "activate", lambda gate, up: F.gelu(gate) * up)


# ---- suffix and time


@mistake("pi0: no state token")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    embed = model.embed_suffix
    # The first action inherits the state token's position and its blindness to the others.
    patch(model, "embed_suffix", lambda *args: (embed(*args)[0][:, 1:], None))


@mistake("pi0: [time, action] order")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    width = model.config.expert.width
    model.action_time_mlp_in.register_forward_pre_hook(lambda _module, args: args[0].roll(width, dims=-1))


@mistake("pi0: first H suffix tokens instead of last H")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    model.expert.register_forward_hook(lambda _module, _args, output: (output[0].roll(1, dims=1), output[1]))


@mistake("time embedding [cos, sin]")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "time_embedding", lambda time, width, *rest: time_embedding(time, width, *rest).roll(width // 2, dims=1))


@mistake("time embedding in float32")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def single(time_B: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
        period_F = min_period * (max_period / min_period) ** torch.linspace(0.0, 1.0, width // 2)
        angle_BF = (2 * torch.pi / period_F)[None, :] * time_B[:, None]
        return torch.cat([angle_BF.sin(), angle_BF.cos()], dim=1)

    patch(pi0, "time_embedding", single)


@mistake("pi05: no second SiLU")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    embed, raw = model.embed_suffix, []
    model.time_mlp_out.register_forward_hook(lambda _module, _args, output: raw.append(output))
    patch(model, "embed_suffix", lambda *args: (embed(*args)[0], raw[-1]))


@mistake("pi05: condition rounded to bf16")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    def rounded(*args: Tensor, embed: Callable = model.embed_suffix) -> tuple[Tensor, Tensor]:
        suffix_BTD, cond_BD = embed(*args)
        return suffix_BTD, cond_BD.bfloat16().float()

    patch(model, "embed_suffix", rounded)


@mistake("timesteps one step late")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "timesteps", lambda num_steps: [time + step_size(num_steps) for time in timesteps(num_steps)])


@mistake("t = 1 - k/N instead of accumulated")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    patch(pi0, "timesteps", lambda num_steps: [1 - k / num_steps for k in range(num_steps)])


@mistake("one step fewer")
def _(patch: Patch, model: Pi0, given: Observation) -> None:
    sample = model.sample_actions
    patch(model, "sample_actions", lambda observation, noise, num_steps: sample(observation, noise, num_steps - 1))


UNMEASURED = {"one step fewer"}
"""Mistakes that the tables do not list."""


# ---- what the original says of them


def effects() -> dict[str, dict[str, str]]:
    """Mistake -> case -> the cell of the README's tables."""
    rows: dict[str, dict[str, str]] = {}
    text = (ROOT / "README.md").read_text()
    for title in ("## Sensitivity", "## Mutation table"):
        section = text[text.index(title) :].split("\n## ")[0]
        head, _, *body = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
        ]
        rows |= {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in body}
    return rows


EFFECTS = effects()
TINY = [case for case in FP32_CASES if case.startswith("tiny")]
# A case of geometry costs as much as ten of tiny, so only mistakes that long sequences are there for.
IN_GEOMETRY = {
    "bf16-rounded RoPE frequencies in fp32",
    "prefix positions 0..S-1 (steps start at the count of valid tokens)",
    "prompt positions + 1",
    "attention scale 2 % off",
    "position of the last valid prefix token + 1",
}


def column_of(case: str) -> str:
    """What the tables call a case: tiny_pi05_a1_fp32 is "pi05 a1"."""
    return case.removeprefix("tiny_").removesuffix("_fp32").replace("_", " ") if case in TINY else "geometry"


def applicable() -> list[tuple[str, str]]:
    """All mistakes with the cases to which they apply."""
    pairs = [(name, case) for name in MISTAKES for case in (FP32_CASES if name in IN_GEOMETRY else TINY)]
    return [(name, case) for name, case in pairs if name in UNMEASURED or EFFECTS[name][column_of(case)] != "-"]


def test_every_mistake_of_the_tables_is_made():
    assert set(EFFECTS) == set(MISTAKES) - UNMEASURED
    assert all(set(cells) == set(map(column_of, FP32_CASES)) for cells in EFFECTS.values())


@pytest.mark.parametrize(("name", "case"), applicable())
def test_mistake_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, case: str):
    model, observation = load_model(case), observation_of(case)
    observation = MISTAKES[name](monkeypatch.setattr, model, observation) or observation
    found = trace(model, observation, noise_of(case), num_steps_of(case))
    failed = failures(case, found)
    effect = EFFECTS[name][column_of(case)] if name not in UNMEASURED else None
    # "not seen": the actions stay, another array has to show it. "0": Pi0.5 does not read what was changed.
    assert ("actions" in failed) == (effect not in ("not seen", "0"))
    assert bool(failed) == (effect != "0")
    if effect is not None:
        # The tables have two digits, and summation in another order is worth up to 1e-6.
        expected = 0.0 if effect == "not seen" else float(effect)
        assert rel_l2(found["actions"], outputs_of(case)["actions"]) == pytest.approx(expected, rel=0.1, abs=2e-6)


@pytest.mark.parametrize("case", TINY)
def test_swapped_cameras_show_in_their_own_tokens(monkeypatch: pytest.MonkeyPatch, case: str):
    """Where only one wrist camera is present, the actions are right all the same."""
    model = load_model(case)
    swapped = MISTAKES["wrist cameras swapped (with their masks)"](monkeypatch.setattr, model, observation_of(case))
    failed = failures(case, trace(model, swapped, noise_of(case), num_steps_of(case)))
    assert {f"image_embeds.{camera}" for camera in (LEFT, RIGHT)} <= set(failed)
    assert f"image_embeds.{BASE}" not in failed


# ---- mistakes under the bf16 policy, which must stand out of its roundings


def bf16_actions(case: str, breaks: Callable[[Pi0], None]) -> Tensor:
    model = load_model(case, BF16)
    breaks(model)
    with torch.inference_mode():
        return model.sample_actions(observation_of(case), noise_of(case), num_steps_of(case))


@pytest.mark.parametrize("cases", ["tiny", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_bf16_scale_off_shows_on_average(monkeypatch: pytest.MonkeyPatch, cases: str):
    """The original with this mistake has 1.54; the limit is 1.25. In bf16 a CPU takes 20 s for the case of geometry."""

    def breaks(model: Pi0) -> None:
        MISTAKES["attention scale 2 % off"](monkeypatch.setattr, model, None)

    ratios = [bf16_ratio(case, bf16_actions(case, breaks)) for case in BF16_CASES if case.startswith(cases)]
    assert geometric_mean(ratios) > 1.25


@pytest.mark.slow
def test_bf16_exact_frequencies_show_in_long_sequences():
    """The original with this mistake has 7.4; the limit is 2."""
    (case,) = (case for case in BF16_CASES if case.startswith("geometry"))

    def breaks(model: Pi0) -> None:
        model.rope.inv_freq = load_model(case, FP32).rope.inv_freq

    assert bf16_ratio(case, bf16_actions(case, breaks)) == pytest.approx(7.4, rel=0.3)
