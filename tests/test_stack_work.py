"""What a stack computes, against PyTorch's own count of the operations of a call of it."""

import pytest
from helpers import CPU, subject_of
from torch.utils.flop_counter import FlopCounterMode

from pi0exp import compose
from pi0exp.stack_work import computed
from pi0exp.subject import StageWork

TINY = ("precision=fp32", "workload.num_steps=3", "workload.horizon=6")
PADDED = ("workload.prompt_tokens=5", "workload.prompt_padded=9")
REWRITES = ("trim_prompt", "batch_cameras", "last_layer_kv", "no_prefix_norm", "hoist_time", "fold_action_in")
REWRITES += ("hoist_modulations", "hoist_state", "cache_room", "rope_tables")


def on(*rewrites: str) -> list[str]:
    return [f"fusion.rewrites.{name}=true" for name in rewrites]


def counted(work: list[StageWork]) -> float:
    return sum(stage.flops * stage.count for stage in work)


STACKS = {
    "plain": [],
    "masked": ["workload.cameras_present=[true,false,true]"],
    "skip": ["workload.cameras_present=[true,false,true]", "image_masking=skip"],
    "ignore": ["workload.cameras_present=[true,false,true]", "image_masking=ignore"],
    "ignore, absent left out": [
        "workload.cameras_present=[true,false,true]",
        *("image_masking=ignore", "image_masking.skip_absent=true"),
    ],
    "projections": ["fusion=projections"],
    "batch": ["workload.batch_size=2"],
    "hoist_time": on("hoist_time"),
    "fold_action_in": on("fold_action_in"),
    "both": on("hoist_time", "fold_action_in"),
    "modulations": on("hoist_modulations"),
    "state": on("hoist_state"),
    "last layer": on("last_layer_kv"),
    "trimmed": on("trim_prompt"),
    "all": on(*REWRITES),
    "all, batch of two": [*on(*REWRITES), "workload.batch_size=2"],
}


EVERY_DAY = ("plain", "masked", "all")


@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
@pytest.mark.parametrize(
    "stack", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in STACKS]
)
def test_operations_are_those_that_pytorch_counts(model: str, stack: str):
    made = subject_of(f"model={model}", *TINY, *PADDED, *STACKS[stack])
    policy, [given] = made.policy(CPU), made.on_device(made.inputs(1).items, CPU)
    with FlopCounterMode(display=False) as counter:
        policy.sample_actions(*given)
    assert counted(made.stack_work()) == counter.get_total_flops()


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_all_rewrites_do_the_least_work(model: str):
    """But for Pi0's state token, which is computed once, and its place among the keys."""
    made = subject_of(f"model={model}", "image_masking=skip", "workload=masked", *on(*REWRITES))
    least, own = made.work(), made.stack_work()
    assert [stage.name for stage in own] == [stage.name for stage in least]
    assert own[0] == least[0]
    assert own[1] == least[1]
    assert own[2].count == least[2].count
    assert least[2].flops <= own[2].flops <= least[2].flops * (1 + 1 / 10 / 10 + 0.001)
    assert own[2].bytes_moved == pytest.approx(least[2].bytes_moved, rel=1e-3)


def test_each_rewrite_saves_what_it_says():
    plain = subject_of("model=pi0", *PADDED)
    work = {stage.name: stage for stage in plain.stack_work()}

    def rewritten(*names: str) -> dict[str, StageWork]:
        return {stage.name: stage for stage in subject_of("model=pi0", *PADDED, *on(*names)).stack_work()}

    weights = 2 * (27 * (4 * 1152**2 + 2 * 1152 * 4304))
    assert work["vision"].bytes_moved - rewritten("batch_cameras")["vision"].bytes_moved > 2 * weights
    layer = 2048 * (2048 + 2 * 256 + 2048 + 3 * 16384)
    saved = work["prefill"].bytes_moved - rewritten("last_layer_kv")["prefill"].bytes_moved
    assert saved == 2 * (layer - 2048 * 2 * 256)
    tokens = 3 * 256 + 9
    assert work["denoise"].bytes_moved - rewritten("cache_room")["denoise"].bytes_moved == 2 * 2 * 18 * tokens * 2 * 256
    assert rewritten("trim_prompt")["prefill"].flops < work["prefill"].flops


@pytest.mark.slow
@pytest.mark.parametrize("stack", sorted(compose.files()["stack"]))
def test_every_named_stack_does_at_least_the_least(stack: str):
    for workload in ("default", "masked"):
        made = subject_of(f"stack={stack}", f"workload={workload}")
        assert counted(made.stack_work()) >= counted(made.work())


def test_prompt_of_a_batch_is_as_long_as_its_longest():
    stack = subject_of(*on("trim_prompt")).stack
    assert computed(stack, False, [True, True, False], [3, 7], 20).prompt == 7
    stack = subject_of().stack
    assert computed(stack, False, [True, True, False], [3, 7], 20).prompt == 20
