"""Pi0: an observation and noise in, a chunk of actions out.

Three stages, each callable by itself:
  vision   `embed_prefix`   pictures and prompt -> prefix tokens
  prefill  `prefill`        prefix tokens -> keys and values of every layer
  denoise  `denoise_step`   noisy actions, time and those keys and values -> velocity, `num_steps` times

Shapes: B batch, S prefix tokens, L prompt tokens, T suffix tokens, C action horizon, A action dim, D width.

Nothing here waits for the device or copies to it: what depends on the observation's values is computed there, what
depends on its structure comes as a plain bool.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.model.config import ModelConfig
from pi0exp.model.gemma import Gemma, LayerCache
from pi0exp.model.layers import Linear, Rope
from pi0exp.model.mask import prefix_mask, suffix_mask
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


class Pi0(nn.Module):
    """Pi0 or Pi0.5, by `config.pi05`."""

    def __init__(self, config: ModelConfig, precision: Precision):
        super().__init__()
        self.config, self.precision = config, precision
        width = config.expert.width
        self.vision = Siglip(config.vision, config.paligemma.width, config.norm_eps)
        self.embedding = nn.Embedding(config.vocab_size, config.paligemma.width)
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
        """Integrate the flow from noise (t = 1) to actions (t = 0) with `num_steps` Euler steps: float32 [B, C, A]."""
        full = observation.structure.full
        prefix_BSD, valid_BS = self.embed_prefix(
            list(observation.images.values()),
            list(observation.camera_masks.values()),
            observation.prompt_BL,
            observation.prompt_mask_BL,
        )
        cache = self.prefill(prefix_BSD, valid_BS, full)
        x_BCA, dt = noise_BCA.to(self.precision.outside), step_size(num_steps)
        for time in timesteps(num_steps):
            time_B = torch.full((observation.batch_size,), time, dtype=torch.float32, device=observation.device)
            x_BCA = x_BCA + dt * self.denoise_step(x_BCA, time_B, observation.state_BA, cache, valid_BS, full)
        return x_BCA

    # ---- vision

    def embed_prefix(
        self, images: list[Tensor], camera_masks: list[Tensor], prompt_BL: Tensor, prompt_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prefix tokens [B, S, D] (picture by picture, then the prompt) and which of them are real, bool [B, S]."""
        tokens = [self.vision(image_BCHW) for image_BCHW in images]
        valid = [mask_B[:, None].expand(-1, self.config.vision.num_patches) for mask_B in camera_masks]
        # Gemma scales its embeddings; the pictures are not scaled. The table's rows are multiplied by the unrounded
        # root and rounded once.
        tokens.append(self.embedding(prompt_BL) * math.sqrt(self.config.paligemma.width))
        return torch.cat(tokens, dim=1), torch.cat([*valid, prompt_mask_BL], dim=1)

    # ---- prefill

    def prefill(self, prefix_BSD: Tensor, valid_BS: Tensor, full: bool) -> list[LayerCache]:
        """Keys and values of every paligemma layer. `full`: the host knows that every prefix token is real."""
        rotation = self.rope(prefix_positions(valid_BS), prefix_BSD.dtype)
        cache: list[LayerCache] = self.paligemma(prefix_BSD, rotation, prefix_mask(valid_BS, full), None, None)[1]
        return cache

    # ---- denoise

    def denoise_step(
        self, x_BCA: Tensor, time_B: Tensor, state_BA: Tensor, cache: list[LayerCache], valid_BS: Tensor, full: bool
    ) -> Tensor:
        """The velocity [B, C, A] at the noisy actions x and the times [B]."""
        suffix_BTD, cond_BD = self.embed_suffix(x_BCA, time_B, state_BA)
        tokens = suffix_BTD.shape[1]
        mask = suffix_mask(valid_BS, tokens, full, blind=not self.config.pi05)
        rotation = self.rope(suffix_positions(valid_BS, tokens), self.precision.activations)
        out_BTD, _ = self.expert(suffix_BTD.to(self.precision.activations), rotation, mask, cache, cond_BD)
        actions_BCD = out_BTD[:, -x_BCA.shape[1] :].to(self.precision.outside)
        velocity: Tensor = self.action_out_proj(actions_BCD)
        return velocity

    def embed_suffix(self, x_BCA: Tensor, time_B: Tensor, state_BA: Tensor) -> tuple[Tensor, Tensor | None]:
        """The suffix tokens [B, T, D] and, for Pi0.5, the condition [B, D] of its adaptive norms."""
        config, outside = self.config, self.precision.outside
        time_BD = time_embedding(time_B, config.expert.width, config.min_period, config.max_period)
        # The embedding is rounded to float32 in every precision: it is part of the function that is computed.
        time_BD = time_BD.float().to(outside)
        action_BCD = self.action_in_proj(x_BCA)
        if config.pi05:
            return action_BCD, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_BD))))
        both_BCE = torch.cat([action_BCD, time_BD[:, None, :].expand_as(action_BCD)], dim=-1)
        action_BCD = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both_BCE)))
        state_B1D = self.state_proj(state_BA.to(outside))[:, None, :]
        return torch.cat([state_B1D, action_BCD], dim=1), None


def prefix_positions(valid_BS: Tensor) -> Tensor:
    """Only real tokens advance the position; a token that is not real repeats the last one (-1 before the first)."""
    return valid_BS.cumsum(dim=1) - 1


def suffix_positions(valid_BS: Tensor, tokens: int) -> Tensor:
    """The suffix goes on counting after the real prefix tokens: [B, T]."""
    return valid_BS.sum(dim=1, keepdim=True) + torch.arange(tokens, device=valid_BS.device)[None, :]
