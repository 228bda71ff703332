"""Fused projections and exact rewrites: the same actions, and each does what it says.

Shapes: B batch, T tokens, N query heads, K key/value heads, H head dim, D width.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from helpers import built, noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from torch import Tensor

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.fusion import steps
from pi0exp.fusion.fusion import Fusion
from pi0exp.fusion.keys_only import KeysOnly, NoNorm
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.image_masking.ignore import Ignore, Steps
from pi0exp.kernels import rope_qkv
from pi0exp.machine import Machine
from pi0exp.model.gemma import GemmaAttention, Rotation
from pi0exp.model.layers import AdaRMSNorm, Linear
from pi0exp.model.pi0 import Context
from pi0exp.model.siglip import VisionAttention
from pi0exp.option import Numerics
from pi0exp.policy import Policy
from pi0exp.verify import rel_l2

NAMES = tuple(one.name for one in fields(Rewrites))
OF_ONE_MODEL = {"fold_action_in": False, "hoist_state": False, "hoist_modulations": True}
"""Rewrites that only one model has -> whether it is Pi0.5."""
EVERY_REWRITE = Rewrites(**dict.fromkeys(NAMES, True))
FLOAT32 = 5e-6
"""Relative L2 of sums in another order; the smallest mistake makes 8e-6."""


def applied(fusion: Fusion, pi05: bool, **settings: int) -> Policy:
    """A float32 policy on the tiny model."""
    policy = tiny_policy(pi05, **settings)
    policy.begin("fusion")
    with torch.no_grad():
        fusion.apply(policy)
    return policy


def only(name: str) -> Fusion:
    return Fusion(rewrites=Rewrites(**{name: True}))


GIVEN = [
    tiny_observation(),
    tiny_observation([(1, 0, 1)], [3]),
    tiny_observation([(0, 1, 1)], [8]),
    tiny_observation([(1, 1, 1), (0, 0, 1)], [2, 6]),
    tiny_observation([(1, 1, 1)] * 2, [8, 8]),
]
"""The last has nothing but real tokens, which the host knows."""
assert [given.structure.full for given in GIVEN] == [False] * 4 + [True]


def distance(policy: Policy, plain: Policy) -> float:
    errors = []
    for given in GIVEN:
        noise_BCA = noise_for(plain, given)
        errors += rel_l2(policy.sample_actions(given, noise_BCA), plain.sample_actions(given, noise_BCA))
    return max(errors)


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize(
    "fusion",
    [
        *(only(name) for name in NAMES),
        Fusion(qkv=True),
        Fusion(gate_up=True),
        Fusion(rewrites=EVERY_REWRITE),
        Fusion(qkv=True, gate_up=True, rewrites=EVERY_REWRITE),
    ],
    ids=lambda fusion: " ".join(fusion.chosen()),
)
def test_same_function_in_float32(fusion: Fusion, pi05: bool):
    """In float32 nothing hides behind roundings; absent cameras, padding and a batch are among the observations."""
    assert distance(applied(fusion, pi05), tiny_policy(pi05)) < FLOAT32


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rewrite_says_what_it_did(name: str, pi05: bool):
    lines = applied(only(name), pi05).applied["fusion"]
    idle = OF_ONE_MODEL.get(name, pi05) != pi05
    assert any("nothing to do" in line for line in lines) == idle


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("words", [(), ("attention=sdpa", "image_masking=skip")], ids=str)
def test_bf16_stays_within_the_bound(pi05: bool, words: tuple[str, ...]):
    model = "tiny_pi05" if pi05 else "tiny"
    rewrites = [f"fusion.rewrites.{name}=true" for name in NAMES]
    instance = built(subject_of("workload.num_steps=3", f"model={model}", "fusion=projections", *rewrites, *words))
    assert instance.verdict.wrong == []


def test_switches_of_the_named_sets():
    names = ("none", "projections", "kernels", "blocks")
    sets = {name: config.stack(plain_config(f"fusion={name}")).fusion for name in names}
    assert sets["none"] == Fusion()
    assert sets["projections"] == Fusion(qkv=True, gate_up=True)
    assert sets["kernels"] == Fusion(qkv=True, gate_up=True, norms=True, activation=True, rope=True)
    rewrites = replace(EVERY_REWRITE, fold_norms=False, fold_q_scale=False)
    assert sets["blocks"] == replace(sets["kernels"], blocks=True, rewrites=rewrites)
    assert sets["none"].numerics is Numerics.EXACT
    assert sets["projections"].numerics is Numerics.REORDERED


def test_unknown_rewrite_is_refused():
    with pytest.raises(UserError, match="no_such"):
        config.stack(plain_config("+fusion.rewrites.no_such=true"))


# ---- what each leaves behind


def count(policy: Policy, kind: type, stage: str) -> int:
    return len(policy.instances(kind, stage))


def test_merged_matrices():
    policy = applied(Fusion(qkv=True, gate_up=True), False)
    for stage, kind in (("vision", VisionAttention), ("prefill", GemmaAttention), ("denoise", GemmaAttention)):
        for attention in policy.instances(kind, stage):
            assert not hasattr(attention, "q")
            assert isinstance(attention.qkv, Linear)
    # Each of the three layers had q, k, v, out, gate, up, down.
    assert count(policy, Linear, "prefill") == 3 * 4
    plain = tiny_policy().model.paligemma.blocks[1].attention
    merged = policy.model.paligemma.blocks[1].attention.qkv.weight
    assert torch.equal(merged, torch.cat([plain.q.weight, plain.k.weight, plain.v.weight]))


def test_last_layer_makes_only_keys_and_values():
    policy = applied(Fusion(rewrites=Rewrites(last_layer_kv=True, no_prefix_norm=True)), False)
    assert isinstance(policy.model.paligemma.blocks[-1], KeysOnly)
    assert isinstance(policy.model.paligemma.norm, NoNorm)
    assert count(policy, GemmaAttention, "prefill") == 2
    assert count(policy, Linear, "prefill") == 2 * 7 + 2


def test_trimmed_prompt_is_what_is_computed():
    policy, seen = applied(only("trim_prompt"), False), []
    policy.wrap_call(lambda call: lambda given, noise: seen.append(given) or call(given, noise), "a spy")
    given = tiny_observation([(1, 1, 1)] * 2, [2, 5], padded=8)
    policy.sample_actions(given, noise_for(policy, given))
    assert seen[0].prompt_padded == 5
    assert seen[0].structure.prompt_full is False
    one = tiny_observation(lengths=[3], padded=8)
    policy.sample_actions(one, noise_for(policy, one))
    assert seen[1].structure.full


def test_cameras_pass_the_tower_together():
    policy, batches = applied(only("batch_cameras"), False), []
    policy.model.vision.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    given = tiny_observation([(1, 1, 1)] * 2, [2, 5])
    policy.sample_actions(given, noise_for(policy, given))
    assert batches == [6]


def test_state_token_is_computed_once():
    policy, tokens = applied(only("hoist_state"), False, num_steps=4), []
    policy.model.expert.register_forward_pre_hook(lambda _module, args: tokens.append(args[0].shape[1]))
    given = tiny_observation()
    policy.sample_actions(given, noise_for(policy, given))
    assert tokens == [1 + policy.horizon, *[policy.horizon] * 3]


def test_time_is_not_computed_in_a_call():
    for pi05, rewrite in ((False, "hoist_time"), (True, "hoist_time"), (True, "hoist_modulations")):
        policy = applied(only(rewrite), pi05)
        policy.model.embed_time = None  # calling it would raise
        given = tiny_observation()
        policy.sample_actions(given, noise_for(policy, given))
    assert not any(hasattr(norm, "dense") for norm in policy.instances(AdaRMSNorm, "denoise"))


def test_tables_of_times_are_of_the_policy_s_steps():
    """A table for another number of steps would be another function."""
    for num_steps in (1, 2, 7):
        plain = tiny_policy(False, num_steps=num_steps)
        assert distance(applied(only("hoist_time"), False, num_steps=num_steps), plain) < FLOAT32


def test_too_many_positions_are_refused():
    policy = applied(only("rope_tables"), False)
    long = tiny_observation(lengths=[5], padded=steps.POSITIONS)
    with pytest.raises(UserError, match=r"positions; fusion\.rewrites\.rope_tables has 4096"):
        policy.sample_actions(long, noise_for(policy, long))


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize(("switches", "heads"), [({}, 2), ({"qkv": True}, 10)], ids=["keys", "queries"])
def test_room_holds_prefix_and_suffix(pi05: bool, switches: dict[str, bool], heads: int):
    policy, seen = applied(replace(only("cache_room"), **switches), pi05), []
    policy.model.expert.register_forward_pre_hook(lambda _module, args: seen.append(args[3]))
    given = tiny_observation([(1, 1, 1)] * 2, [5, 8])
    policy.sample_actions(given, noise_for(policy, given))
    prefix = 3 * 16 + 8
    for cache in seen[0]:
        assert tuple(cache.room.shape) == (2, prefix + policy.horizon + (not pi05), heads, 32)
        assert tuple(cache.k_BSKH.shape) == tuple(cache.v_BSKH.shape) == (2, prefix, 1, 32)
    # All steps write to the same buffers.
    assert {cache.room.data_ptr() for caches in seen for cache in caches} == {c.room.data_ptr() for c in seen[0]}
    plain = tiny_policy(pi05)
    noise_BCA = noise_for(plain, given)
    assert max(rel_l2(policy.sample_actions(given, noise_BCA), plain.sample_actions(given, noise_BCA))) < FLOAT32


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["all layers", "the last makes only keys and values"])
def test_rotation_by_the_kernel(last: bool, pi05: bool, monkeypatch: pytest.MonkeyPatch):
    """Who rotates and stores is asked with the right arguments: here the kernel's reference is in its place."""
    calls = []

    def reference(*given: Any) -> Tensor:
        calls.append(given[0].shape[2])
        return rope_qkv.rope_qkv_cached_reference(*given)

    monkeypatch.setattr(rope_qkv, "rope_qkv_cached", reference)
    policy = applied(Fusion(qkv=True, rope=True, rewrites=Rewrites(last_layer_kv=last)), pi05)
    assert distance(policy, tiny_policy(pi05)) < FLOAT32
    assert calls.count(0) == last * len(GIVEN)


# ---- mistakes that the checks above must see


def wrong_moment(model: object, index: int, time: float, batch_size: int) -> Tensor:
    return model.moments[max(index - 1, 0)]


@pytest.mark.parametrize("pi05", [False, True])
def test_table_read_one_step_late_is_found(pi05: bool):
    policy = applied(only("hoist_time"), pi05)
    policy.model.moment = wrong_moment
    assert distance(policy, tiny_policy(pi05)) > 10 * FLOAT32


def test_state_that_is_forgotten_is_found():
    policy = applied(only("hoist_state"), False)
    settle = policy.model.after_first

    def forgetful(model: object, context: Context) -> Context:
        settled = settle(model, context)
        settled.valid_BS[:, -1] = False
        return settled._replace(full=False)

    policy.model.after_first = forgetful
    assert distance(policy, tiny_policy()) > 10 * FLOAT32


def test_rotation_of_the_state_s_place_is_found():
    policy = applied(Fusion(rewrites=Rewrites(rope_tables=True, hoist_state=True)), False)
    settle = policy.model.after_first

    def late(model: object, context: Context) -> Context:
        rotation = context.rotation[0][:, :-1], context.rotation[1][:, :-1]
        return settle(model, context)._replace(rotation=rotation)

    policy.model.after_first = late
    assert distance(policy, tiny_policy()) > 10 * FLOAT32


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("wrong", [0, 3 * 16 + 8], ids=["prefix", "suffix"])
def test_rows_of_the_tables_one_late_are_found(wrong: int, pi05: bool):
    """Where every token is real nothing is looked up: the rotations are rows of the tables, from 0 and behind them."""
    policy, starts = applied(only("rope_tables"), pi05), []
    at = policy.model.rope.at

    def late(start: int, stop: int) -> Rotation:
        starts.append(start)
        return at(start + (start == wrong), stop + (start == wrong))

    policy.model.rope.at = late
    noise_BCA = noise_for(policy, GIVEN[-1])
    found, plain = (one.sample_actions(GIVEN[-1], noise_BCA) for one in (policy, tiny_policy(pi05)))
    assert starts == [0, 3 * 16 + 8]
    assert max(rel_l2(found, plain)) > 10 * FLOAT32


def test_swapped_keys_and_values_are_found():
    policy = applied(Fusion(qkv=True, rewrites=Rewrites(last_layer_kv=True)), False)
    layer = policy.model.paligemma.blocks[-1]
    layer.kv.weight = torch.nn.Parameter(layer.kv.weight.roll(32, dims=0), requires_grad=False)
    assert distance(policy, tiny_policy()) > 10 * FLOAT32


def test_fusion_is_frozen_like_every_option():
    with pytest.raises(AttributeError):
        replace(Fusion(), qkv=True).qkv = False  # type: ignore[misc]


# ---- beside masks that are dropped

OF_MASKS = {
    "hoist_state": "that the state token sees no actions",
    "trim_prompt": "that nobody sees padding",
}
"""Rewrites that rest on a mask -> what they take it."""


@pytest.mark.parametrize("name", NAMES)
def test_what_rests_on_a_mask_is_refused_where_masks_are_dropped(name: str):
    stack = config.stack(plain_config("image_masking=ignore", f"fusion.rewrites.{name}=true"))
    reasons = build.unmet(stack, Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90"))
    told = (
        f"fusion: rewrites.{name} takes it {OF_MASKS.get(name)}; image_masking=ignore drops the masks that make it so"
    )
    assert reasons == ([told] if name in OF_MASKS else [])


@pytest.mark.parametrize("steps", list(Steps))
@pytest.mark.parametrize("name", NAMES)
def test_rewrites_where_masks_are_dropped(name: str, steps: Steps):
    """All others compute what dropping the masks alone computes; those that rest on them do not, which is why."""
    alone, both = tiny_policy(), tiny_policy()
    for policy, rewrites in ((alone, Rewrites()), (both, Rewrites(**{name: True}))):
        policy.begin("image_masking")
        Ignore(steps=steps).apply(policy)
        policy.begin("fusion")
        with torch.no_grad():
            Fusion(rewrites=rewrites).apply(policy)
    found = distance(both, alone)
    assert found > 1e-2 if name in OF_MASKS else found <= FLOAT32
