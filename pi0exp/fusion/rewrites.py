"""Exact rewrites: the same function of the observation with less work. All but the skipping of absent cameras, which is
`image_masking=skip`.

None of them changes the function in exact arithmetic, of the masks that the original has; where operations come in
another order, roundings differ.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor, cat

from pi0exp.fusion import folds, steps, vision
from pi0exp.fusion.keys_only import KeysOnly, NoNorm
from pi0exp.model.gemma import GemmaBlock
from pi0exp.model.observation import Observation
from pi0exp.model.pi0 import Pi0
from pi0exp.policy import Policy

if TYPE_CHECKING:
    from pi0exp.config import Stack


@dataclass(frozen=True)
class Rewrites:
    """One switch each.

    trim_prompt: padding behind the longest prompt of the batch is not computed. batch_cameras: one pass of the vision
    tower for all cameras. last_layer_kv: the last prefill layer makes only keys and values. no_prefix_norm: the final
    norm of the prefix, which nobody reads, is left out. hoist_time: time embeddings and what depends on them alone are
    computed once, when the stack is applied. hoist_modulations: so are Pi0.5's scales, shifts and gates.
    fold_action_in: Pi0's two matrices on the noisy actions become one. hoist_state: Pi0's state token is computed in
    the first step only and kept in the cache, which implies cache_room. cache_room: the steps write their keys and
    values behind the prefix's instead of copying both together. rope_tables: cosines and sines are looked up, and those
    of the suffix once a call. fold_norms: the weights of norms are multiplied into the matrices behind them.
    fold_q_scale: so is the scale of the scores. patch_product: the patch embedding is a matrix product, which a
    convolution without overlap is.
    """

    trim_prompt: bool = False
    batch_cameras: bool = False
    last_layer_kv: bool = False
    no_prefix_norm: bool = False
    hoist_time: bool = False
    fold_action_in: bool = False
    hoist_modulations: bool = False
    hoist_state: bool = False
    cache_room: bool = False
    rope_tables: bool = False
    fold_norms: bool = False
    fold_q_scale: bool = False
    patch_product: bool = False

    def chosen(self) -> list[str]:
        return [one.name for one in fields(self) if getattr(self, one.name)]

    def clashes(self, stack: "Stack") -> list[str]:
        """Why they are no rewrites of what the stack computes: two of them rest on the masks of the original."""
        from pi0exp.image_masking.ignore import Ignore

        if not isinstance(stack.image_masking, Ignore):
            return []
        rests = {
            "hoist_state": "that the state token sees no actions",
            "trim_prompt": "that nobody sees padding",
        }
        return [
            f"rewrites.{name} takes it {what}; image_masking=ignore drops the masks that make it so"
            for name, what in rests.items()
            if getattr(self, name)
        ]

    def apply(self, policy: Policy, queries_in_room: bool) -> None:
        """In an order in which none needs what another has taken away. queries_in_room: see `steps.give_room`."""
        if self.trim_prompt:
            policy.prepare_with(trimmed, "without padding behind the longest prompt")
        if self.patch_product:
            vision.patches_as_product(policy)
        if self.batch_cameras:
            policy.fill_model("embed_images", all_images, "one pass for all cameras")
        # Before the last layer loses its queries.
        if self.fold_q_scale:
            folds.fold_q_scale(policy)
        if self.fold_norms:
            folds.fold_norms(policy)
        if self.last_layer_kv:
            last = policy.instances(GemmaBlock, "prefill")[-1]
            policy.model.paligemma.blocks[-1] = KeysOnly(last)
            policy.note("prefill: the last layer makes only keys and values")
        if self.no_prefix_norm:
            policy.model.paligemma.norm = NoNorm()
            policy.note("prefill: no final norm")
        if self.hoist_time or self.fold_action_in or self.hoist_modulations:
            steps.rewrite_suffix(policy, self.hoist_time, self.fold_action_in, self.hoist_modulations)
        if self.cache_room:
            steps.give_room(policy, queries_in_room)
        if self.hoist_state:
            steps.hoist_state(policy, queries_in_room)
        if self.rope_tables:
            steps.tabulate_rope(policy)


def trimmed(observation: Observation) -> Observation:
    """The same observation; prompt columns in which no row has a real token are left out."""
    return observation.only_prompt(max(observation.prompt_lengths))


def all_images(model: Pi0, images: list[Tensor]) -> list[Tensor]:
    """The slot `Pi0.embed_images`: one pass of the vision tower over all pictures, tokens [B, P, D] of each camera."""
    return list(model.vision(cat(images)).chunk(len(images))) if images else []
