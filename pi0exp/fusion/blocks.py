"""The denoising step as a chain of hand-fused Triton kernels: `fusion.blocks`. Read from here downwards: what it fills,
a step, a layer.

`pi0exp.kernels.stream` has the scheme, each kernel's file its maths. A step is `stream_begin`, five launches a layer
and `stream_end`; before it `stream_embed` makes tokens of Pi0's noisy actions, where `fusion.rewrites` have folded
their matrices and tabulated the time. Every launch waits only where it needs what the one in front made, and equal
inputs give equal bits. With `fusion.persistent` all layers are one launch where there are few rows, with `fusion.wide`
also where there are up to 64 (`pi0exp.fusion.persistent`).

Against the plain model fewer values are rounded: the normed rows' shifts, the products before rotation, before the
gated activation and before the residual sum, the gates, and the last normed row. None is rounded more often.

Without `wide`, more rows than STREAMED (a horizon of 50, say) are no stream of weights any more: then the step is the
plain one with what the other switches put into it, and `attend_split`.

Shapes: B batch, S cached tokens, T suffix tokens, C action horizon, A action dim, D width, L layers, I steps.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from pi0exp.fusion.persistent import Layers, form_for
from pi0exp.fusion.steps import give_room, tabulate
from pi0exp.model.gemma import GemmaBlock, LayerCache, Rotation, first_rows
from pi0exp.model.layers import Attention, at_least_float32
from pi0exp.model.mask import Mask
from pi0exp.model.pi0 import Context, Pi0, plain_step, suffix_positions
from pi0exp.policy import Policy

if TYPE_CHECKING:
    from pi0exp.config import Stack
    from pi0exp.fusion.fusion import Fusion

NAME = "fusion.blocks"
STREAMED = 32
"""Rows up to which a step is a stream. The kernels take 64, but a call of 51 rows, a horizon of 50, took 18.3 ms, and
one of `h200_best`, whose steps are the plain ones between kernels, 17.6 (on an H100: experiments/speed.md)."""


# ---- what it needs, and what it fills


def clashes(fusion: "Fusion", stack: "Stack") -> list[str]:
    """Why the blocks cannot stand beside the other switches and options."""
    from pi0exp.compile_mode.none import NoCompile
    from pi0exp.gemm.blas import Blas
    from pi0exp.image_masking.ignore import Ignore, Steps
    from pi0exp.precision.fp8 import Fp8
    from pi0exp.precision.fp32 import Fp32

    reasons = [
        f"blocks needs fusion.{name}"
        for name, there in (
            ("qkv", fusion.qkv),
            ("gate_up", fusion.gate_up),
            ("rewrites.hoist_modulations", fusion.rewrites.hoist_modulations),
        )
        if not there
    ]
    alone = "blocks computes the denoising step by itself:"
    if not isinstance(stack.gemm.at("denoise"), Blas):
        reasons.append(f"{alone} gemm.denoise must be blas")
    if stack.attention.at("denoise") is not stack.attention:
        reasons.append(f"{alone} leave attention.denoise alone")
    if not isinstance(stack.compile_mode.at("denoise"), NoCompile):
        reasons.append(f"{alone} compile_mode.denoise must be none")
    if isinstance(stack.precision, Fp8) and "denoise" in stack.precision.stages():
        reasons.append(f"{alone} precision=fp8 must keep denoise in bf16 (precision.keep=[denoise])")
    if fusion.ring and isinstance(stack.precision, Fp32):
        reasons.append("ring needs weights in bf16: precision must not be fp32")
    if isinstance(stack.image_masking, Ignore) and stack.image_masking.steps is Steps.causal:
        reasons.append("blocks has no causal mask: image_masking.steps must be all")
    return reasons


def fill_blocks(policy: Policy, fusion: "Fusion") -> None:
    """Fills the slot `Pi0.step`, what more rows than a stream takes need, and the embedding of the noisy actions."""
    from pi0exp.attention.triton_attention import triton_attend
    from pi0exp.kernels.attention_split import attend_split
    from pi0exp.kernels.skinny_gemm import COUNTERS

    give_room(policy, queries=False)
    if policy.model.config.pi05:
        tabulate_offsets(policy)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=policy.device)
    layers, first = None, ""
    if fusion.persistent:
        rows = policy.horizon + policy.model.config.suffix_prelude
        form = form_for(rows, fusion.ring, fusion.wide)
        weights = ", weights through a ring" if fusion.ring else ""
        if form is None:
            first = f"{rows} rows are too many for all layers in one launch: "
        else:
            layers = Layers(policy.model.expert, torch.zeros_like(counters), form)
            first = f"all layers in one launch{weights}, up to {form.rows} rows of one observation; else "
    stream = Stream(counters, STREAMED, layers)
    policy.fill_model("step", stream.step, f"{first}a stream of kernels, up to {STREAMED} rows")
    attend = partial(triton_attend, op=attend_split)
    policy.fill(Attention, "attend", attend, ("denoise",), f"Triton attend_split, for more than {STREAMED} rows")
    policy.closed["denoise"] = NAME
    if policy.model.config.pi05:
        policy.fill_model("embed_actions", embed_with_modulations, "one launch")
    elif fusion.rewrites.hoist_time and fusion.rewrites.fold_action_in:
        policy.fill_model("embed_actions", embed_actions, "two launches")


def embed_actions(model: Pi0, x_BCA: Tensor, moment: Tensor) -> tuple[Tensor, None]:
    """The slot `Pi0.embed_actions` of Pi0 whose first matrices are one; the moment is the time's share, [1, D]."""
    from pi0exp.kernels.stream_embed import stream_embed

    first, last = model.action_in_proj, model.action_time_mlp_out
    weights = first.weight, first.bias, moment.flatten(), last.weight, last.bias
    return stream_embed(x_BCA.contiguous(), *weights), None


def embed_with_modulations(model: Pi0, x_BCA: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The same of Pi0.5: the moment is the row of `tabulate_offsets`."""
    from pi0exp.kernels.stream_embed import stream_embed

    return stream_embed(x_BCA.contiguous(), model.action_in_proj.weight, model.action_in_proj.bias), moment


# ---- a step


class Norms(NamedTuple):
    """What the norms of a step do to columns: two of each layer, in order, then the final one.

    scales: [D] of each, what one is added to. gates: [D] of each branch, or None. offsets: what the shift becomes in
    the product behind each norm of a layer, or None. shift: [D] of the final norm, or None.
    """

    scales: Sequence[Tensor]
    gates: Sequence[Tensor | None]
    offsets: Sequence[Tensor | None]
    shift: Tensor | None


class Rows(NamedTuple):
    """The residual stream between two launches.

    x: [B, T, D]. xs: its columns times 1 + scale of the norm to come. squares: sums of squares of its rows, [P, B T].
    """

    x: Tensor
    xs: Tensor
    squares: Tensor


class Stream:
    """The slot `Pi0.step`, with the counters that all of its launches share and leave as they find them."""

    def __init__(self, counters: Tensor, max_rows: int, layers: Layers | None):
        self.counters, self.max_rows, self.layers = counters, max_rows, layers

    def step(self, model: Pi0, x_BCA: Tensor, moment: Tensor, context: Context) -> Tensor:
        """The velocity [B, C, A]."""
        from pi0exp.kernels.stream_ends import stream_begin, stream_end

        B, C, _ = x_BCA.shape
        T = C + (context.state_BA is not None)
        layers = self.layers if self.layers is not None and self.layers.takes(B, T) else None
        if self.max_rows < B * T and layers is None:
            return plain_step(model, x_BCA, moment, context)
        tokens_BTD, cond = model.embed_suffix(x_BCA, moment, context.state_BA)
        mask = model.mask_suffix(context.valid_BS, T, context.full, context.state_BA is not None)
        rotation = context.rotation or model.rope(suffix_positions(context.valid_BS, T), model.precision.activations)
        blocks = layers_of(model)
        norms = own_norms(model) if cond is None else modulated_norms(model, cond)
        # The state token's keys may be those that the first step has just written; all others are the prefill's.
        settled = context.cache[0].k_BSKH.shape[1] - model.config.suffix_prelude
        if layers is not None:
            xs, squares = layers(tokens_BTD, cond, rotation, mask, context.cache, settled)
        else:
            rows = Rows(*stream_begin(tokens_BTD.contiguous(), norms.scales[0], blocks[0].attention.qkv.weight))
            for i, block in enumerate(blocks):
                following = blocks[(i + 1) % len(blocks)]
                rows = self.layer(block, 2 * i, rows, norms, rotation, mask, context.cache[i], settled, following)
            xs, squares = rows.xs, rows.squares
        out = model.action_out_proj
        velocity: Tensor = stream_end(
            xs, squares, norms.shift, out.weight, out.bias, C, model.config.norm_eps
        )  # fmt: skip
        return velocity

    # ---- a layer

    def layer(
        self, block: GemmaBlock, first: int, rows: Rows, norms: Norms, rotation: Rotation, mask: Mask,
        cache: LayerCache, settled: int, following: GemmaBlock,
    ) -> Rows:  # fmt: skip
        """Five launches. first: the number of the layer's first norm; following: the block after it,
        whose first weight the launches ask for as they do for the layer's own (`pi0exp.kernels.ahead`).
        """
        from pi0exp.kernels.stream_attention import stream_attention
        from pi0exp.kernels.stream_gated import stream_gated
        from pi0exp.kernels.stream_qkv import stream_qkv
        from pi0exp.kernels.stream_residual import stream_residual

        attention, mlp, eps, counters = block.attention, block.mlp, block.norm1.eps, self.counters
        assert cache.room is not None
        assert not mask.causal, "image_masking=ignore refuses the blocks beside steps=causal"
        room_k, room_v, _ = first_rows(cache.room, cache.room.shape[1], attention.num_kv_heads)
        start = cache.k_BSKH.shape[1]
        seen = start + rows.x.shape[1]
        keys_BS = None if mask.full else mask.keys_BS

        q_BTNH = stream_qkv(
            rows.xs, rows.squares, attention.qkv.weight, norms.offsets[first], *rotation, room_k, room_v, start, eps,
            counters, mlp.gate_up.weight,
        )  # fmt: skip
        mixed_BTNH = stream_attention(
            q_BTNH, room_k[:, :seen], room_v[:, :seen], keys_BS, mask.blind, attention.scale, settled, counters,
            attention.out.weight,
        )  # fmt: skip
        rows = Rows(
            *stream_residual(
                mixed_BTNH.flatten(2), attention.out.weight, rows.x, norms.gates[first], norms.scales[first + 1],
                counters, mlp.down.weight,
            )
        )  # fmt: skip
        hidden_BTF = stream_gated(
            rows.xs, rows.squares, mlp.gate_up.weight, norms.offsets[first + 1], eps, counters,
            following.attention.qkv.weight,
        )  # fmt: skip
        return Rows(
            *stream_residual(
                hidden_BTF, mlp.down.weight, rows.x, norms.gates[first + 1], norms.scales[first + 2], counters
            )
        )  # fmt: skip


# ---- the norms of a step


def layers_of(model: Pi0) -> list[GemmaBlock]:
    """The blocks of the expert."""
    return cast(list[GemmaBlock], list(model.expert.blocks))


def own_norms(model: Pi0) -> Norms:
    """Pi0's: weights of their own, the same in every step."""
    norms = [norm for block in layers_of(model) for norm in (block.norm1, block.norm2)]
    scales = [cast(Tensor, norm.weight) for norm in (*norms, model.expert.norm)]
    nothing = [None] * len(norms)
    return Norms(scales, nothing, nothing, None)


def modulated_norms(model: Pi0, cond: Tensor) -> Norms:
    """Pi0.5's, from the row that `tabulate_offsets` made for the step."""
    blocks, width = layers_of(model), model.config.expert.width
    of_norms, *offsets = cond.split(
        [modulation_values(model)] + [one for block in blocks for one in offset_sizes(block)]
    )  # fmt: skip
    scales, shifts, gates = (part.unbind() for part in of_norms.view(-1, 3, width).unbind(1))
    # The final norm has two places in the table and stands in the first; it gates nothing.
    return Norms(scales[:-1], gates[:-2], offsets, shifts[-2])


def modulation_values(model: Pi0) -> int:
    """Of scale, shift and gate: two norms of every layer, and the final one in two places."""
    return (len(model.expert.blocks) + 1) * 2 * 3 * model.config.expert.width


def offset_sizes(block: GemmaBlock) -> tuple[int, int]:
    """Rows of the matrices behind the two norms."""
    return block.attention.qkv.weight.shape[0], block.mlp.gate_up.weight.shape[0]


def tabulate_offsets(policy: Policy) -> None:
    """Behind the modulations of each step, what every shift becomes in the product that follows: one row a step."""
    model = policy.model
    blocks = policy.instances(GemmaBlock, "denoise")
    rows = []
    for modulations in model.moments:  # [L + 1, 2, 1, 1, 3 D]
        offsets = []
        for block, pair in zip(blocks, modulations, strict=False):
            for weight, modulation in zip((block.attention.qkv.weight, block.mlp.gate_up.weight), pair, strict=True):
                shift_D = modulation.flatten().chunk(3)[1]
                wide = at_least_float32(weight.dtype)
                offsets.append((weight.to(wide) @ shift_D.to(wide)).to(shift_D.dtype))
        rows.append(torch.cat([modulations.flatten(), *offsets]))
    tabulate(policy, torch.stack(rows), "scale, shift and gate of every norm, and the shifts' share of the products")
    model.expert.conditions = partial(modulations_of, model)


def modulations_of(model: Pi0, cond: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The slot `Gemma.conditions`, for steps of more rows than a stream takes."""
    assert cond is not None
    modulations = cond[: modulation_values(model)].view(count, 2, 1, 1, -1)
    return modulations.unbind()
