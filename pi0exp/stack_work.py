"""What a stack itself computes, in contrast to the least work of its workload.

`roofline.policy_work` is one number for a workload, so that a share of it compares stacks. Here is what the structure
of one stack asks for: absent cameras and padding that it does not drop, layers that nobody reads, weights that it reads
once a camera, matrices that it applies in every step though their result never changes. The distance between both is
what rewrites can still save, the distance from here to the measured time what better kernels can.

Counted are matrix products and attentions over all keys of the sequence, masked or not, and the bytes of weights, of
pictures and of keys and values; activations count as kept on chip, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi0exp.model.config import ModelConfig
from pi0exp.roofline import StageSum, vision_work
from pi0exp.subject import StageWork

if TYPE_CHECKING:
    from pi0exp.config import Stack


@dataclass(frozen=True)
class Computed:
    """What of the policy is computed, for a batch whose rows are alike.

    cameras, prompt: pictures and prompt tokens of each row, real or not. tower_passes: how often the vision tower's
    weights are read. The rest: what is still computed that a rewrite of `fusion.rewrites` would save.
    """

    batch: int
    cameras: int
    prompt: int
    tower_passes: int
    whole_last_layer: bool
    times: bool
    modulations: bool
    unfolded_actions: bool
    state_every_step: bool
    copied_cache: bool


def computed(stack: Stack, pi05: bool, cameras_present: list[bool], lengths: list[int], padded: int) -> Computed:
    """How a stack computes a workload. lengths: real prompt tokens of each row; padded: tokens that are given."""
    from pi0exp.fusion.fusion import Fusion
    from pi0exp.image_masking.ignore import Ignore
    from pi0exp.image_masking.skip import Skip

    masking, fusion = stack.image_masking, stack.fusion
    assert isinstance(fusion, Fusion)
    rewrites = fusion.rewrites
    drops = isinstance(masking, Skip) or (isinstance(masking, Ignore) and masking.skip_absent)
    cameras = sum(cameras_present) if drops else len(cameras_present)
    return Computed(
        batch=len(lengths),
        cameras=cameras,
        prompt=max(lengths) if rewrites.trim_prompt else padded,
        tower_passes=min(1, cameras) if rewrites.batch_cameras else cameras,
        whole_last_layer=not rewrites.last_layer_kv,
        times=not (rewrites.hoist_time or (pi05 and rewrites.hoist_modulations)),
        modulations=not rewrites.hoist_modulations,
        unfolded_actions=not rewrites.fold_action_in,
        state_every_step=not rewrites.hoist_state,
        # Kernels that write into the cache, and the state token that stays there, bring its room with them.
        copied_cache=not (rewrites.cache_room or (rewrites.hoist_state and not pi05) or fusion.rope or fusion.blocks),
    )


def stack_work(
    config: ModelConfig, done: Computed, horizon: int, num_steps: int, bytes_per_value: int
) -> list[StageWork]:
    """The stages of one call, as `roofline.policy_work` gives them."""
    gemma, expert, patches = config.paligemma, config.expert, config.vision.num_patches
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    vision = vision_work(config, done.batch * done.cameras, bytes_per_value, passes=done.tower_passes)

    prefix = done.cameras * patches + done.prompt
    rows, whole = done.batch * prefix, gemma.depth - 1 + done.whole_last_layer
    cache = rows * 2 * key_value  # values of one layer
    p = StageSum(bytes_per_value)
    p.gemm(rows, query + 2 * key_value, gemma.width, times=whole)
    p.attention(done.batch * prefix**2, query, whole)
    p.gemm(rows, gemma.width, query, times=whole)
    p.gemm(rows, 2 * gemma.mlp_dim, gemma.width, times=whole)
    p.gemm(rows, gemma.width, gemma.mlp_dim, times=whole)
    if not done.whole_last_layer:
        p.gemm(rows, 2 * key_value, gemma.width)
    p.values += gemma.depth * cache + rows * gemma.width

    d, actions, width = StageSum(bytes_per_value), done.batch * horizon, expert.width
    for step in range(num_steps):
        state = config.suffix_prelude * (done.state_every_step or step == 0)
        suffix = state + horizon
        d.gemm(actions, width, config.action_dim, bias=True)
        if config.pi05:
            if done.times:
                d.gemm(done.batch, width, width, times=2, bias=True)
            if done.modulations:
                # One row where the condition is tabulated: it broadcasts over the batch.
                d.gemm(done.batch if done.times else 1, 3 * width, width, times=2 * expert.depth + 1, bias=True)
        else:
            d.gemm(done.batch * state, width, config.action_dim, bias=True)
            d.gemm(actions, width, width, bias=True)
            _time_and_action(d, actions, width, done)
        d.gemm(done.batch * suffix, query + 2 * key_value, width, times=expert.depth)
        d.attention(done.batch * suffix * (prefix + config.suffix_prelude + horizon), query, expert.depth)
        d.gemm(done.batch * suffix, width, query, times=expert.depth)
        d.gemm(done.batch * suffix, 2 * expert.mlp_dim, width, times=expert.depth)
        d.gemm(done.batch * suffix, width, expert.mlp_dim, times=expert.depth)
        d.gemm(actions, config.action_dim, width, bias=True)
        # Read by attention; where it is copied, also read and written to stand before the new keys and values.
        d.values += gemma.depth * cache * (3 if done.copied_cache else 1)
    steps = StageWork("denoise", d.flops / num_steps, d.values * bytes_per_value / num_steps, num_steps)
    return [vision, p.work("prefill"), steps]


def _time_and_action(d: StageSum, actions: int, width: int, done: Computed) -> None:
    """Pi0's first matrix on [action, time], whole or in halves.

    Plain: one matrix on both for every action. `hoist_time` and `fold_action_in` cut it in two, of which the first
    saves the time's, the second the action's.
    """
    if done.times and done.unfolded_actions:
        d.gemm(actions, width, 2 * width, bias=True)
    elif done.unfolded_actions:
        d.gemm(actions, width, width)
    elif done.times:
        d.gemm(done.batch, width, width, bias=True)
