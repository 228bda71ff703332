"""Masks are dropped: padding and absent cameras are attended to as if they were real. Another function.

Here to reproduce the fastest published stack for MI350 (the fork sunxxuns/openpi-1 at e6a5e17, which forces its prefill
attention to no mask, and calls SDPA with `is_causal` where it denoises) and to show what that does to the actions.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from pi0exp.attention.eager import Eager
from pi0exp.attention.sdpa import Sdpa
from pi0exp.config import Stack
from pi0exp.image_masking.skip import without_absent_cameras
from pi0exp.model.mask import Mask
from pi0exp.option import Numerics, Option
from pi0exp.policy import Policy


class Steps(StrEnum):
    """What the denoising steps see."""

    all = "all"
    causal = "causal"


@dataclass(frozen=True)
class Ignore(Option):
    """Everything sees everything.

    steps: `all`: every suffix token sees every key. `causal`: suffix token t sees the keys 0 to t only, as PyTorch
    aligns a causal mask that is wider than high, which is what the published stack computes.
    skip_absent: leave out cameras that no row has, as `image_masking=skip` does.
    """

    numerics = Numerics.APPROXIMATE

    steps: Steps = Steps.all
    skip_absent: bool = False

    def clashes(self, stack: Stack) -> list[str]:
        stages = dict(stack.attention.parts())
        if self.steps is Steps.all or isinstance(stages.get("denoise", stages.get("")), Eager | Sdpa):
            return []
        return ["steps=causal is computed by attention.denoise=eager and sdpa only"]

    def apply(self, policy: Policy) -> None:
        if self.skip_absent:
            policy.prepare_with(without_absent_cameras, "without cameras that no row has")
        policy.fill_model("mask_prefix", everything, "no mask: absent cameras and padding count as real")
        if self.steps is Steps.causal:
            policy.fill_model("mask_suffix", causal, "token t sees the keys 0 to t only")
        else:
            policy.fill_model("mask_suffix", everything_and_itself, "no mask: every token sees every key")


def everything(valid_BS: Tensor, full: bool) -> Mask:
    """The slot `Pi0.mask_prefix`."""
    return Mask(torch.ones_like(valid_BS), valid_BS.shape[1], full=True)


def everything_and_itself(valid_BS: Tensor, suffix_tokens: int, full: bool, blind: bool) -> Mask:
    """The slot `Pi0.mask_suffix`."""
    return Mask(torch.ones_like(valid_BS), suffix_tokens, full=True, own=True)


def causal(valid_BS: Tensor, suffix_tokens: int, full: bool, blind: bool) -> Mask:
    """The same with a causal mask aligned at the first key."""
    B, S = valid_BS.shape
    return Mask(valid_BS.new_ones(B, S + suffix_tokens), suffix_tokens, full=True, causal=True)
