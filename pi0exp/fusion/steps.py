"""What the denoising steps compute again and again although it does not change between them.

Shapes: B batch, S prefix tokens, T suffix tokens, C action horizon, A action dim, D width, L layers of the expert,
I steps, H head dim, P positions.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0exp.errors import UserError
from pi0exp.model.gemma import GemmaBlock, LayerCache, Rotation, first_rows
from pi0exp.model.layers import AdaRMSNorm, Linear, Rope
from pi0exp.model.observation import Observation
from pi0exp.model.pi0 import Context, Pi0, no_cache, plain_rotate_prefix, suffix_positions, timesteps
from pi0exp.policy import Policy

POSITIONS = 4096
"""Length of the tables of cosines and sines; a call needs one row for each prefix and suffix token."""


# ---- time


def rewrite_suffix(policy: Policy, time: bool, action_in: bool, modulations: bool) -> None:
    """The three rewrites of how noisy actions and time become tokens and conditions. Some are of one model only."""
    model = policy.model
    if model.config.pi05:
        if time or modulations:
            tabulate_conditions(policy, modulations)
        if action_in:
            policy.note("fold_action_in: nothing to do, Pi0.5 has one matrix on the actions")
        return
    if modulations:
        policy.note("hoist_modulations: nothing to do, Pi0's norms depend on no time")
    if not (time or action_in):
        return
    both, width = model.action_time_mlp_in, model.config.expert.width
    of_action, of_time = both.weight[:, :width].clone(), both.weight[:, width:].clone()
    if action_in:
        first = model.action_in_proj
        model.action_in_proj = linear(of_action @ first.weight, of_action @ first.bias)
        policy.note("denoise: one matrix on the noisy actions instead of two")
    else:
        model.action_half = linear(of_action, None)
    time_half = linear(of_time, both.bias.clone())
    if time:
        rows = [time_half(model.embed_time(time_B)) for time_B in step_times(policy)]
        tabulate(policy, torch.stack(rows), "the time's share of the first layer")
    else:
        model.time_half = time_half
    del model.action_time_mlp_in
    policy.fill_model("embed_actions", embed_actions(time, action_in), "action and time halves apart")


def embed_actions(time: bool, action_in: bool) -> Callable[[Pi0, Tensor, Tensor], tuple[Tensor, None]]:
    """The slot `Pi0.embed_actions` of Pi0 with these rewrites; the moment is a row [1, D] of the table if `time`."""

    def embed(model: Pi0, x_BCA: Tensor, moment: Tensor) -> tuple[Tensor, None]:
        action_BCD = model.action_in_proj(x_BCA)
        if not action_in:
            action_BCD = model.action_half(action_BCD)
        time_BD = moment if time else model.time_half(model.embed_time(moment))
        return model.action_time_mlp_out(F.silu(action_BCD + time_BD[:, None, :])), None

    return embed


def tabulate_conditions(policy: Policy, modulations: bool) -> None:
    """Pi0.5's conditions [I, 1, D] or, of every norm, scale, shift and gate: [I, L + 1, 2, 1, 1, 3 D]."""
    model = policy.model
    conditions = [model.condition(model.embed_time(time_B)) for time_B in step_times(policy)]
    del model.time_mlp_in, model.time_mlp_out
    if not modulations:
        tabulate(policy, torch.stack(conditions), "the condition of the norms")
        policy.fill_model("embed_actions", embed_with_condition, "looks the condition up")
        return
    norms = [(block.norm1, block.norm2) for block in policy.instances(GemmaBlock, "denoise")]
    norms.append((model.expert.norm, model.expert.norm))
    rows = [
        torch.stack([torch.stack([norm.modulate(norm, cond_BD) for norm in pair]) for pair in norms])
        for cond_BD in conditions
    ]
    tabulate(policy, torch.stack(rows), "scale, shift and gate of every norm")
    for first, second in norms:
        # The final norm stands in for both: it reads the first.
        second.modulate = second_modulation
        first.modulate = first_modulation
    for norm in policy.instances(AdaRMSNorm, "denoise"):
        del norm.dense
    model.expert.conditions = apart
    policy.fill_model("embed_actions", embed_with_condition, "looks the modulations up")


def embed_with_condition(model: Pi0, x_BCA: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The slot `Pi0.embed_actions` of Pi0.5: the moment is the condition."""
    return model.action_in_proj(x_BCA), moment


def apart(cond: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The slot `Gemma.conditions`: [L + 1, 2, 1, 1, 3 D] -> for each block, and the final norm, [2, 1, 1, 3 D]."""
    assert cond is not None
    assert len(cond) == count
    return cond.unbind()


def first_modulation(norm: AdaRMSNorm, cond: Tensor) -> Tensor:
    """The slot `AdaRMSNorm.modulate` of a block's first norm: [1, 1, 3 D]."""
    return cond[0]


def second_modulation(norm: AdaRMSNorm, cond: Tensor) -> Tensor:
    """The same of a block's second norm."""
    return cond[1]


def step_times(policy: Policy) -> list[Tensor]:
    """The time [1] of every step."""
    return [policy.model.moment(policy.model, i, time, 1) for i, time in enumerate(timesteps(policy.num_steps))]


def tabulate(policy: Policy, table: Tensor, what: str) -> None:
    """Let step i know row i of `table` instead of its time."""
    policy.model.register_buffer("moments", table, persistent=False)
    policy.fill_model("moment", tabulated, f"a row of a table of {len(table)}: {what}")


def tabulated(model: Pi0, index: int, time: float, batch_size: int) -> Tensor:
    """The slot `Pi0.moment`. Broadcasts over the batch."""
    return model.moments[index]


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A matrix with these values."""
    with torch.device("meta"):
        made = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


# ---- cache and state


def give_room(policy: Policy, queries: bool) -> None:
    """Let prefill and steps write their keys and values into one buffer a layer, of the size of prefix and suffix.

    queries: with a place for queries beside them, so that what one matrix made goes into one buffer.
    """
    if policy.model.empty_cache is not no_cache:
        return  # another rewrite or kernel needed it before
    suffix = policy.horizon + (not policy.model.config.pi05)

    def empty_cache(model: Pi0, prefix_BSD: Tensor) -> list[LayerCache]:
        B, S, _ = prefix_BSD.shape
        config = model.config
        heads = 2 * config.num_kv_heads + (config.num_heads if queries else 0)
        rooms = prefix_BSD.new_empty(config.paligemma.depth, B, S + suffix, heads, config.head_dim)
        return [first_rows(room, 0, config.num_kv_heads) for room in rooms.unbind()]

    policy.fill_model("empty_cache", empty_cache, "a buffer a layer with room for the suffix behind the prefix")


def hoist_state(policy: Policy, queries: bool) -> None:
    """Pi0's state token sees neither the actions nor the time, so its keys and values are the same in every step.

    The first step computes them with its own tokens and leaves them in the cache; the others have the actions alone.
    queries: of the cache, see `give_room`.
    """
    if policy.model.config.pi05:
        policy.note("hoist_state: nothing to do, Pi0.5 has no state token")
        return
    give_room(policy, queries)
    policy.fill_model("after_first", state_in_cache, "the state token is computed in the first step only")


def state_in_cache(model: Pi0, context: Context) -> Context:
    """The slot `Pi0.after_first`: the row behind the prefix, which the first step wrote, belongs to the cache."""
    caches = []
    for k_BSKH, _, room in context.cache:
        assert room is not None
        caches.append(first_rows(room, k_BSKH.shape[1] + 1, k_BSKH.shape[2]))
    valid_BS, rotation = context.valid_BS, context.rotation
    if context.full:
        valid_BS = valid_BS[:, :1].expand(-1, valid_BS.shape[1] + 1)  # no launch: all of them are real
    else:
        valid_BS = torch.cat([valid_BS, valid_BS.new_ones(valid_BS.shape[0], 1)], dim=1)
    if rotation is not None:
        rotation = rotation[0][:, 1:], rotation[1][:, 1:]
    return Context(caches, valid_BS, context.full, None, rotation)


# ---- rotation


class RopeTable(Rope):
    """`Rope` by tables of `dtype`, made once: cosines and sines [P + 1, H] of the positions 0 to P - 1, and of -1.

    That is where a masked token stands before the first real one; an index of -1 is the last row.
    """

    cos_PH: Tensor
    sin_PH: Tensor

    def __init__(self, rope: Rope, dtype: torch.dtype):
        nn.Module.__init__(self)
        positions_1P = torch.arange(POSITIONS + 1, device=rope.inv_freq.device)[None]
        positions_1P[0, -1] = -1
        cos_1P1H, sin_1P1H = rope(positions_1P, dtype)
        self.register_buffer("inv_freq", rope.inv_freq, persistent=False)
        self.register_buffer("cos_PH", cos_1P1H[0, :, 0].contiguous(), persistent=False)
        self.register_buffer("sin_PH", sin_1P1H[0, :, 0].contiguous(), persistent=False)

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Rope.forward`."""
        assert dtype == self.cos_PH.dtype
        return self.cos_PH[positions_BT][:, :, None], self.sin_PH[positions_BT][:, :, None]

    def at(self, start: int, stop: int) -> Rotation:
        """[1, stop - start, 1, H] of the positions from start to stop, of every row of the batch: no launch."""
        return self.cos_PH[None, start:stop, None], self.sin_PH[None, start:stop, None]


def tabulate_rope(policy: Policy) -> None:
    """Look cosines and sines up, those of the suffix once a call; where every token is real, as rows of the tables."""
    model = policy.model
    patches, horizon = model.config.vision.num_patches, policy.horizon
    model.rope = RopeTable(model.rope, model.precision.activations)

    def fits(observation: Observation) -> Observation:
        needed = len(observation.images) * patches + observation.prompt_padded + horizon + 1
        if needed > POSITIONS:
            raise UserError(f"{needed} tokens need as many positions; fusion.rewrites.rope_tables has {POSITIONS}")
        return observation

    policy.prepare_with(fits, f"checked against {POSITIONS} positions")
    policy.fill_model("rotate_prefix", rotation_of_prefix, "looked up")
    policy.fill_model("preparations", (*model.preparations, rotation_of_suffix), "one rotation for all steps")


def rotation_of_prefix(model: Pi0, valid_BS: Tensor, full: bool) -> Rotation:
    """The slot `Pi0.rotate_prefix`."""
    if not full:
        return plain_rotate_prefix(model, valid_BS, full)
    assert isinstance(model.rope, RopeTable)
    return model.rope.at(0, valid_BS.shape[1])


def rotation_of_suffix(model: Pi0, context: Context, horizon: int) -> Context:
    """The suffix stands at the same positions in every step."""
    tokens = horizon + (context.state_BA is not None)
    if context.full:
        assert isinstance(model.rope, RopeTable)
        S = context.valid_BS.shape[1]
        return context._replace(rotation=model.rope.at(S, S + tokens))
    positions_BT = suffix_positions(context.valid_BS, tokens)
    return context._replace(rotation=model.rope(positions_BT, model.precision.activations))
