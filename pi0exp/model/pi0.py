"""Pi0: an observation and noise in, a chunk of actions out.

Three stages, each callable by itself:
  vision   `embed_prefix`   pictures and prompt -> prefix tokens
  prefill  `prefill`        prefix tokens -> keys and values of every layer
  denoise  `begin`          once: what the steps share
           `denoise_step`   noisy actions, the moment and what the steps share -> velocity, `num_steps` times

Shapes: B batch, S prefix tokens, L prompt tokens, T suffix tokens, C action horizon, A action dim, D width.

Nothing here waits for the device or copies to it: what depends on the observation's values is computed there, what
depends on its structure comes as a plain bool.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.model.config import ModelConfig
from pi0exp.model.gemma import Gemma, LayerCache, Rotation
from pi0exp.model.layers import Linear, Rope
from pi0exp.model.mask import Mask, prefix_mask, suffix_mask
from pi0exp.model.observation import Observation
from pi0exp.model.precision import Precision
from pi0exp.model.siglip import Siglip


def timesteps(num_steps: int) -> list[float]:
    """The times of the steps, from 1 (noise) down, accumulated in float32 like the original's loop variable."""
    dt, time, times = step_size(num_steps), torch.tensor(1.0), []
    for _ in range(num_steps):
        times.append(time.item())
        time = time + dt
    return times


def step_size(num_steps: int) -> float:
    """-1 / num_steps, rounded to float32."""
    return torch.tensor(-1.0 / num_steps, dtype=torch.float32).item()


def time_embedding(time_B: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """[sin, cos] of 2 pi t / period with `width` / 2 periods spaced geometrically: [B, width], computed in float64."""
    fraction_F = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time_B.device)
    period_F = min_period * (max_period / min_period) ** fraction_F
    angle_BF = (2 * math.pi / period_F)[None, :] * time_B.double()[:, None]
    return torch.cat([angle_BF.sin(), angle_BF.cos()], dim=1)


class Context(NamedTuple):
    """What the denoising steps share.

    cache: keys and values of every layer that stand before the suffix. valid_BS: bool, which of them are real.
    full: the host knows that all of them are. state_BA: the state whose token is the first of the suffix; None where
    the suffix has none. rotation: cosine and sine of the suffix; None where every step computes them.
    """

    cache: list[LayerCache]
    valid_BS: Tensor
    full: bool
    state_BA: Tensor | None
    rotation: Rotation | None = None


def each_image(model: "Pi0", images: list[Tensor]) -> list[Tensor]:
    """One pass of the vision tower a camera: tokens [B, P, D] of each."""
    return [model.vision(image) for image in images]


def no_cache(model: "Pi0", prefix_BSD: Tensor) -> None:
    """The prefill makes its keys and values by itself."""


def same_context(model: "Pi0", context: Context) -> Context:
    """All steps are alike."""
    return context


def plain_moment(model: "Pi0", index: int, time: float, batch_size: int) -> Tensor:
    """What step `index` needs to know of its time: the time, float32 [B]."""
    return torch.full((batch_size,), time, dtype=torch.float32, device=model.rope.inv_freq.device)


def plain_embed_actions(model: "Pi0", x_BCA: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens of the noisy actions [B, C, D] and, for Pi0.5, the condition [B, D] of its adaptive norms."""
    action_BCD = model.action_in_proj(x_BCA)
    time_BD = model.embed_time(time_B)
    if model.config.pi05:
        return action_BCD, model.condition(time_BD)
    both_BCE = torch.cat([action_BCD, time_BD[:, None, :].expand_as(action_BCD)], dim=-1)
    return model.action_time_mlp_out(F.silu(model.action_time_mlp_in(both_BCE))), None


def plain_rotate_prefix(model: "Pi0", valid_BS: Tensor, full: bool) -> Rotation:
    """Cosines and sines [B, S, 1, H] of the prefix."""
    rotation: Rotation = model.rope(prefix_positions(valid_BS), model.precision.activations)
    return rotation


def plain_step(model: "Pi0", x_BCA: Tensor, moment: Tensor, context: Context) -> Tensor:
    """The velocity: the suffix's tokens through the expert, against the cache."""
    suffix_BTD, cond_BD = model.embed_suffix(x_BCA, moment, context.state_BA)
    valid_BS, tokens = context.valid_BS, suffix_BTD.shape[1]
    mask = model.mask_suffix(valid_BS, tokens, context.full, context.state_BA is not None)
    rotation = context.rotation or model.rope(suffix_positions(valid_BS, tokens), model.precision.activations)
    out_BTD, _ = model.expert(suffix_BTD.to(model.precision.activations), rotation, mask, context.cache, cond_BD)
    actions_BCD = out_BTD[:, -x_BCA.shape[1] :].to(model.precision.outside)
    velocity: Tensor = model.action_out_proj(actions_BCD)
    return velocity


class Pi0(nn.Module):
    """Pi0 or Pi0.5, by `config.pi05`.

    Slots of the model itself: `embed_images` (model, pictures) -> tokens of each; `mask_prefix` and `mask_suffix`, as
    in `mask`; `rotate_prefix` (model, which prefix tokens are real, whether all are) -> their cosines and sines;
    `empty_cache` (model, prefix) -> what the prefill writes to, or None; `moment` (model, step, time, batch
    size) -> what the step is told of it; `embed_actions` (model, noisy actions, moment) -> tokens, condition;
    `preparations`, each (model, context, horizon) -> context, done by `begin`; `step` (model, noisy actions, moment,
    context) -> velocity; `after_first` (model, context) -> context of the second and later steps.
    """

    embed_images: Callable[["Pi0", list[Tensor]], list[Tensor]] = staticmethod(each_image)
    mask_prefix: Callable[[Tensor, bool], Mask] = staticmethod(prefix_mask)
    mask_suffix: Callable[[Tensor, int, bool, bool], Mask] = staticmethod(suffix_mask)
    rotate_prefix: Callable[["Pi0", Tensor, bool], Rotation] = staticmethod(plain_rotate_prefix)
    empty_cache: Callable[["Pi0", Tensor], list[LayerCache] | None] = staticmethod(no_cache)
    moment: Callable[["Pi0", int, float, int], Tensor] = staticmethod(plain_moment)
    embed_actions: Callable[["Pi0", Tensor, Tensor], tuple[Tensor, Tensor | None]] = staticmethod(plain_embed_actions)
    preparations: tuple[Callable[["Pi0", Context, int], Context], ...] = ()
    step: Callable[["Pi0", Tensor, Tensor, Context], Tensor] = staticmethod(plain_step)
    after_first: Callable[["Pi0", Context], Context] = staticmethod(same_context)
    # Where fusion.rewrites split or tabulate what a step is told of its time.
    action_half: Linear
    time_half: Linear
    moments: Tensor

    def __init__(self, config: ModelConfig, precision: Precision):
        super().__init__()
        self.config, self.precision = config, precision
        width = config.expert.width
        self.vision = Siglip(config.vision, config.paligemma.width, config.norm_eps)
        # Given a matrix it draws no numbers, which would be thrown away and, on the meta device, import a compiler.
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.paligemma.width), freeze=False
        )
        self.paligemma = Gemma(config.paligemma, config, adaptive=False)
        self.expert = Gemma(config.expert, config, adaptive=config.pi05)
        self.rope = Rope(config.head_dim, config.rope_theta, precision.rounded)
        self.action_in_proj = Linear(config.action_dim, width)
        self.action_out_proj = Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(config.action_dim, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)

    def sample_actions(self, observation: Observation, noise_BCA: Tensor, num_steps: int = 10) -> Tensor:
        """Integrate the flow from noise (t = 1) to actions (t = 0) with `num_steps` Euler steps: float32 [B, C, A].

        x + dt v is one operation that rounds once; the original, which rounds dt v too, is a bit of float32 away.
        """
        full = observation.structure.full
        prefix_BSD, valid_BS = self.embed_prefix(
            list(observation.images.values()),
            list(observation.camera_masks.values()),
            observation.prompt_BL,
            observation.prompt_mask_BL,
        )
        cache = self.prefill(prefix_BSD, valid_BS, full)
        context = self.begin(cache, valid_BS, observation.state_BA, noise_BCA.shape[1], full)
        x_BCA, dt = noise_BCA.to(self.precision.outside), step_size(num_steps)
        for step, time in enumerate(timesteps(num_steps)):
            moment = self.moment(self, step, time, observation.batch_size)
            x_BCA = torch.add(x_BCA, self.denoise_step(x_BCA, moment, context), alpha=dt)
            if step == 0:
                context = self.after_first(self, context)
        return x_BCA

    # ---- vision

    def embed_prefix(
        self, images: list[Tensor], camera_masks: list[Tensor], prompt_BL: Tensor, prompt_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prefix tokens [B, S, D] (picture by picture, then the prompt) and which of them are real, bool [B, S]."""
        tokens = self.embed_images(self, images)
        valid = [mask_B[:, None].expand(-1, self.config.vision.num_patches) for mask_B in camera_masks]
        # Gemma scales its embeddings; the pictures are not scaled. The table's rows are multiplied by the unrounded
        # root and rounded once.
        tokens.append(self.embedding(prompt_BL) * math.sqrt(self.config.paligemma.width))
        return torch.cat(tokens, dim=1), torch.cat([*valid, prompt_mask_BL], dim=1)

    # ---- prefill

    def prefill(self, prefix_BSD: Tensor, valid_BS: Tensor, full: bool) -> list[LayerCache]:
        """Keys and values of every paligemma layer. `full`: the host knows that every prefix token is real."""
        rotation = self.rotate_prefix(self, valid_BS, full)
        past, mask = self.empty_cache(self, prefix_BSD), self.mask_prefix(valid_BS, full)
        cache: list[LayerCache] = self.paligemma(prefix_BSD, rotation, mask, past, None)[1]
        return cache

    # ---- denoise

    def begin(self, cache: list[LayerCache], valid_BS: Tensor, state_BA: Tensor, horizon: int, full: bool) -> Context:
        """What the steps share: the cache and the state as they are, and whatever the `preparations` make of them."""
        context = Context(cache, valid_BS, full, None if self.config.pi05 else state_BA)
        for prepare in self.preparations:
            context = prepare(self, context, horizon)
        return context

    def denoise_step(self, x_BCA: Tensor, moment: Tensor, context: Context) -> Tensor:
        """The velocity [B, C, A] at the noisy actions x and the moment (plain: the times [B])."""
        return self.step(self, x_BCA, moment, context)

    def embed_suffix(self, x_BCA: Tensor, moment: Tensor, state_BA: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The suffix tokens [B, T, D], Pi0's state first if it is given, and the condition of adaptive norms."""
        action_BCD, cond_BD = self.embed_actions(self, x_BCA, moment)
        if state_BA is None or self.config.pi05:
            return action_BCD, cond_BD
        return torch.cat([self.embed_state(state_BA), action_BCD], dim=1), cond_BD

    def embed_state(self, state_BA: Tensor) -> Tensor:
        """Pi0's state token [B, 1, D]."""
        token_BD: Tensor = self.state_proj(state_BA.to(self.precision.outside))
        return token_BD[:, None, :]

    def embed_time(self, time_B: Tensor) -> Tensor:
        """The time embedding [B, D], rounded to float32 in every precision: it is part of the function."""
        config = self.config
        time_BD = time_embedding(time_B, config.expert.width, config.min_period, config.max_period)
        return time_BD.float().to(self.precision.outside)

    def condition(self, time_BD: Tensor) -> Tensor:
        """Pi0.5's condition [B, D] of the adaptive norms."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_BD))))


def prefix_positions(valid_BS: Tensor) -> Tensor:
    """Only real tokens advance the position; a token that is not real repeats the last one (-1 before the first)."""
    return valid_BS.cumsum(dim=1) - 1


def suffix_positions(valid_BS: Tensor, tokens: int) -> Tensor:
    """The suffix goes on counting after the real prefix tokens: [B, T]."""
    return valid_BS.sum(dim=1, keepdim=True) + torch.arange(tokens, device=valid_BS.device)[None, :]
