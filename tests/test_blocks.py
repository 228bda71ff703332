"""fusion=blocks on the tiny models, under Triton's interpreter; `test_kernels` has the kernels themselves.

TRITON_INTERPRET decides when a kernel's file is imported, so the interpreter has a process of its own: this file run as
a script, which prints a line of JSON for each point.

It cuts float32 off where hardware rounds to bfloat16, and so says 1.3 times the plain model's error of models in
bfloat16; of fusion=kernels 1.5 times, which on a GPU has less than once (experiments/README.md, covering). So the
function is held to float64 here, and bfloat16 to its bound on a GPU: `test_blocks_gpu`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import interpreter
import pytest
import torch
from helpers import noise_for, plain_config, tiny_observation, tiny_policy
from interpreter import interprets, points
from torch import Tensor

from pi0exp import build, config
from pi0exp.attention.sdpa import Sdpa
from pi0exp.fusion import blocks
from pi0exp.fusion.fusion import Fusion
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention
from pi0exp.model.pi0 import Context, timesteps
from pi0exp.model.precision import BF16, FP32, FP32_TRUTH
from pi0exp.policy import Policy
from pi0exp.verify import FP32_LIMIT, rel_l2

OBSERVATIONS = {
    "full": {"lengths": (8,)},  # and of one camera only
    "no prompt": {"cameras": ((1, 0, 0),), "lengths": (0,)},
    "masked differently": {"cameras": ((1, 0, 1), (0, 0, 1)), "lengths": (6, 3)},
    "masked": {"cameras": ((1, 0, 1),), "lengths": (6,)},
}
HORIZONS = {"full": 3, "no prompt": 1, "masked differently": 2, "masked": 4}
RIGHT = [("tiny", "masked differently")]
THOROUGH = [
    ("tiny", "full"),
    ("tiny_pi05", "masked differently"),
    ("tiny", "no prompt"),
    ("tiny_pi05", "no prompt"),
]
IN_ONE_LAUNCH = [("tiny_pi05", "no prompt")]
IN_ONE_LAUNCH_THOROUGH = [
    ("tiny", "full"),
    ("tiny_pi05", "masked"),
    ("tiny", "masked differently"),
    ("tiny", "masked"),
]


def fusion() -> Fusion:
    option = config.stack(plain_config("fusion=blocks")).fusion
    assert isinstance(option, Fusion)
    return option


def streamed(policy: Policy, **switches: bool) -> Policy:
    """The blocks alone, unless switches say more: the kernels of the other stages have tests of their own."""
    alone = dict.fromkeys(("norms", "activation", "rope"), False)
    policy.begin("fusion")
    with torch.no_grad():
        replace(fusion(), **alone | switches).apply(policy)
    return policy


# ---- what a step may lose


def wrong_norm(policy: Policy) -> None:
    """The second norm's weights in the place of the first's."""
    block = policy.model.expert.blocks[1]
    block.norm1.weight = block.norm2.weight


def wrong_offset(policy: Policy) -> None:
    """The shift's share of the last product behind a norm is forgotten."""
    policy.model.moments[:, -192:] = 0.0


def wrong_room(policy: Policy) -> None:
    """A layer reads the keys and values of its neighbour."""

    def step(model: Any, x: Tensor, moment: Tensor, context: Context) -> Tensor:
        return real(model, x, moment, context._replace(cache=[context.cache[0], context.cache[0], context.cache[2]]))

    real, policy.model.step = policy.model.step, step


def forgets_masks(policy: Policy) -> None:
    def step(model: Any, x: Tensor, moment: Tensor, context: Context) -> Tensor:
        return real(model, x, moment, context._replace(full=True))

    real, policy.model.step = policy.model.step, step


FAULTS: dict[str, Callable[[Policy], None]] = {
    "norm": wrong_norm,
    "offset": wrong_offset,
    "room": wrong_room,
    "masks": forgets_masks,
}
WRONG = [("tiny", "full", "norm")]
WRONG_SLOWLY = [("tiny_pi05", "no prompt", "offset"), ("tiny", "full", "room"), ("tiny", "masked differently", "masks")]


# ---- the process that interprets


def error(
    model: str, observation: str, spoil: Callable[[Policy], None] = lambda policy: None, **switches: bool
) -> float:
    """The largest relative L2 error of the actions in float32 against float64, over the rows of the observation."""
    given, actions = tiny_observation(**OBSERVATIONS[observation]), []
    given = given.only_cameras(["left_wrist_0_rgb"]) if observation == "full" else given
    for precision in (FP32_TRUTH, FP32):
        policy = tiny_policy(model == "tiny_pi05", precision, horizon=HORIZONS[observation], num_steps=2)
        if precision is FP32:
            spoil(streamed(policy, **switches))
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    return max(rel_l2(actions[1], actions[0]))


def repeated() -> bool:
    """Whether the same inputs give the same bits, with another input between."""
    policy = streamed(tiny_policy(precision=BF16, horizon=2, num_steps=1))
    one, other = (tiny_observation(seed=seed).only_cameras([]) for seed in (0, 1))
    first = policy.sample_actions(one, noise_for(policy, one))
    policy.sample_actions(other, noise_for(policy, other))
    return torch.equal(first, policy.sample_actions(one, noise_for(policy, one)))


def many_rows() -> float:
    """The error where there are more rows than a stream takes: 2 x 17. Pi0.5 has its modulations in another form."""
    given, actions = tiny_observation([(1, 0, 0)] * 2, (0, 1)), []
    for precision in (FP32_TRUTH, FP32):
        policy = tiny_policy(True, precision, horizon=17, num_steps=1)
        if precision is FP32:
            streamed(policy)
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    return max(rel_l2(actions[1], actions[0]))


def interpret(points: list[list[str]]) -> None:
    """Prints what came of every point."""
    torch.set_num_threads(1)
    for kind, *point in points:
        found: Any
        if kind == "right":
            found = error(*point)
        elif kind == "wrong":
            found = error(point[0], point[1], FAULTS[point[2]])
        elif kind == "in one launch":
            found = error(*point, persistent=True)
        elif kind == "wrong in one launch":
            found = error(point[0], point[1], FAULTS[point[2]], persistent=True)
        else:
            found = {"repeated": repeated, "many rows": many_rows}[kind]()
        print(json.dumps([[kind, *point], found]), flush=True)


@pytest.fixture(scope="module")
def interpreted(request) -> dict[tuple[str, ...], Any]:
    return interpreter.of_points(request)


@interprets
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "point",
    [
        *points("right", RIGHT, THOROUGH),
        *points("in one launch", IN_ONE_LAUNCH, IN_ONE_LAUNCH_THOROUGH),
        *points("many rows", [], [()]),
    ],
)
def test_actions_are_the_same(point, interpreted):
    assert interpreted[point] <= FP32_LIMIT


@interprets
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "point",
    [
        *points("wrong", WRONG, WRONG_SLOWLY),
        *points("wrong in one launch", [("tiny", "masked", "masks")], [("tiny_pi05", "masked", "offset")]),
    ],
)
def test_what_a_step_loses_is_found(point, interpreted):
    assert interpreted[point] > FP32_LIMIT


@interprets
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("point", points("repeated", [], [()]))
def test_equal_inputs_give_equal_bits(point, interpreted):
    assert interpreted[point] is True


# ---- the option


ALONE = "fusion: blocks computes the denoising step by itself:"
CLASHES = [
    (["attention=triton", "graphs=manual", "image_masking=skip"], []),
    (["attention=sdpa", "graphs=split", "gemm.library=cublaslt", "compile_mode.vision=default"], []),
    (["attention=sdpa", "attention.denoise=triton"], [f"{ALONE} leave attention.denoise alone"]),
    (["gemm=triton", "gemm.denoise=blas"], []),
    (["gemm=triton"], [f"{ALONE} gemm.denoise must be blas"]),
    (["gemm.denoise=triton"], [f"{ALONE} gemm.denoise must be blas"]),
    (["compile_mode=default"], [f"{ALONE} compile_mode.denoise must be none"]),
    (["precision=fp8"], [f"{ALONE} precision=fp8 must keep denoise in bf16 (precision.keep=[denoise])"]),
    (["precision=fp8", "precision.keep=[denoise]"], []),
    (["image_masking=ignore", "fusion.rewrites.hoist_state=false", "fusion.rewrites.trim_prompt=false"], []),
    (["fusion.persistent=true"], []),
    (["fusion.persistent=true", "fusion.blocks=false"], ["fusion: persistent needs fusion.blocks"]),
    (["fusion.persistent=true", "fusion.ring=true"], []),
    (["fusion.ring=true"], ["fusion: ring needs fusion.persistent"]),
    (["fusion.persistent=true", "fusion.ring=true", "fusion.wide=true"], []),
    (["fusion.persistent=true", "fusion.wide=true"], ["fusion: wide needs fusion.ring"]),
    (
        ["fusion.persistent=true", "fusion.ring=true", "precision=fp32"],
        ["fusion: ring needs weights in bf16: precision must not be fp32"],
    ),
    (["fusion.qkv=false"], ["fusion: blocks needs fusion.qkv"]),
    (["fusion.gate_up=false"], ["fusion: blocks needs fusion.gate_up"]),
    (["fusion.rewrites.hoist_modulations=false"], ["fusion: blocks needs fusion.rewrites.hoist_modulations"]),
]
H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")


@pytest.mark.parametrize(("words", "reasons"), CLASHES, ids=lambda value: " ".join(value))
def test_what_it_stands_beside(words, reasons):
    stack = config.stack(plain_config("fusion=blocks", *words))
    assert build.unmet(stack, H200) == reasons


def test_a_causal_mask_is_refused():
    stack = config.stack(plain_config("fusion=blocks", "image_masking=ignore", "image_masking.steps=causal"))
    assert "fusion: blocks has no causal mask: image_masking.steps must be all" in build.unmet(stack, H200)


def test_one_launch_is_for_hopper():
    stack = config.stack(plain_config("fusion=blocks", "fusion.persistent=true"))
    a100 = Machine(gpu="NVIDIA A100", vendor="nvidia", arch="sm_80")
    wanted = "fusion: persistent needs the architecture sm_90; this machine has NVIDIA A100 (sm_80)"
    assert build.unmet(stack, a100) == [wanted]


def test_the_stack_has_all_exact_rewrites():
    option = config.stack(plain_config("stack=9_blocks")).fusion
    assert option == fusion()
    left_out = {one.name for one in fields(Rewrites)} - set(option.rewrites.chosen())
    assert left_out == {"fold_norms", "fold_q_scale"}
    assert r"stream_(qkv|layers|ring|wide)|attend_combine" in option.proofs()
    assert config.stack(plain_config("stack=10_persistent")).fusion == replace(option, persistent=True)
    hopper = config.stack(plain_config("fusion=hopper")).fusion
    assert hopper == replace(option, persistent=True, ring=True, wide=True, gelu_epilogue=True)
    assert config.stack(plain_config("stack=11_hopper")).fusion == hopper


def test_options_for_all_stages_leave_its_stage_alone():
    policy = streamed(tiny_policy())
    before = [module.attend for module in policy.instances(Attention, "denoise")]
    policy.begin("attention")
    Sdpa().apply(policy)
    assert [module.attend for module in policy.instances(Attention, "denoise")] == before
    assert all(module.attend not in before for module in policy.instances(Attention, "prefill"))
    assert policy.applied["attention"][-1] == "denoise: left to fusion.blocks"


@pytest.mark.parametrize(("horizon", "plain"), [(blocks.STREAMED - 1, False), (blocks.STREAMED, True), (50, True)])
def test_many_rows_are_no_stream(horizon: int, plain: bool, monkeypatch: pytest.MonkeyPatch):
    """With the state token in front of the actions."""

    def streams(*given: object) -> None:
        raise InterruptedError

    policy, given = streamed(tiny_policy(horizon=horizon, num_steps=1)), tiny_observation()
    model = policy.model
    monkeypatch.setattr(blocks, "plain_step", lambda model, x_BCA, moment, context: torch.full_like(x_BCA, 2.0))
    monkeypatch.setattr(model, "embed_actions", streams)
    noise_BCA = torch.zeros(1, horizon, model.config.action_dim)
    context = Context([], given.prompt_mask_BL, False, given.state_BA)
    if plain:
        assert (model.denoise_step(noise_BCA, model.moments[0], context) == 2.0).all()
    else:
        with pytest.raises(InterruptedError):
            model.denoise_step(noise_BCA, model.moments[0], context)


def test_actions_become_tokens_by_the_kernel_where_their_matrices_are_folded():
    assert streamed(tiny_policy()).model.embed_actions is blocks.embed_actions
    assert streamed(tiny_policy(pi05=True)).model.embed_actions is not blocks.embed_actions
    policy, whole = tiny_policy(), fusion()
    policy.begin("fusion")
    with torch.no_grad():
        replace(whole, rewrites=replace(whole.rewrites, fold_action_in=False)).apply(policy)
    assert policy.model.embed_actions is not blocks.embed_actions


def test_row_of_a_step_holds_modulations_and_offsets():
    """Against the plain norms of Pi0.5: what the shift becomes is the product of the shift alone."""
    plain, policy = tiny_policy(True), streamed(tiny_policy(True))
    model, width = plain.model, plain.model.config.expert.width
    norms = blocks.modulated_norms(policy.model, policy.model.moments[1])
    cond = model.condition(model.embed_time(torch.full((1,), timesteps(plain.num_steps)[1])))
    for i, block in enumerate(model.expert.blocks):
        for n, norm in ((2 * i, block.norm1), (2 * i + 1, block.norm2)):
            scale, shift, gate = norm.dense(cond)[0].chunk(3)
            for found, wanted in ((norms.scales[n], scale), (norms.gates[n], gate)):
                assert torch.allclose(found, wanted, atol=1e-6)
            matrices = (block.attention.q, block.attention.k, block.attention.v)
            if n % 2:
                matrices = (block.mlp.gate, block.mlp.up)
            wanted = torch.cat([matrix.weight @ shift for matrix in matrices])
            assert torch.allclose(norms.offsets[n], wanted, atol=1e-5)
    final = model.expert.norm.dense(cond)[0]
    assert torch.allclose(norms.scales[-1], final[:width], atol=1e-6)
    assert torch.allclose(norms.shift, final[width : 2 * width], atol=1e-6)
    assert len(norms.scales) == 2 * 3 + 1


if __name__ == "__main__":
    interpret(json.loads(sys.argv[1]))
