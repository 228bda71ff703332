"""Every option keeps its word on the tiny models, says what it did, and one that does not keep its word is caught.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim, C horizon, A action dim.
"""

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import pytest
import torch
from golden import BF16_CASES, load_model, noise_of, num_steps_of, observation_of
from helpers import GROUPS_OF, built, lacking, plain_config, subject_of, tiny_observation, tiny_policy, with_option
from torch import Tensor, nn

from pi0exp import build, config
from pi0exp.attention.eager import Eager
from pi0exp.attention.sdpa import Sdpa
from pi0exp.checked import apply_checked
from pi0exp.config import GROUPS
from pi0exp.image_masking.skip import without_absent_cameras
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention, Linear, eager_attend
from pi0exp.model.mask import Mask
from pi0exp.model.precision import BF16, BF16_TRUTH, Precision
from pi0exp.option import ANY_GPU, STAGES, Numerics, Option, Requires, StagedOption
from pi0exp.policy import DeviceCall, Policy
from pi0exp.policy_subject import PolicyInstance, PolicySubject
from pi0exp.verify import judge

MODELS = ("tiny", "tiny_pi05")
OPTIONS = [(group, name) for group in GROUPS for name in GROUPS_OF[group]]
PLAIN = {group: plain_config()["names"][group] for group in GROUPS}
HOST = Machine()
COMPILERS = {("compile_mode", "default")}


def few_steps(*words: str) -> PolicySubject:
    return subject_of("workload.num_steps=3", *words)


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_no_garbage() -> Iterator[None]:
    """Each verification collects garbage, which takes as long as itself if it looks through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


_made: dict[str, PolicyInstance] = {}


def made(*words: str) -> PolicyInstance:
    """Built and verified; once for all words that mean the same."""
    subject = few_steps(*words)
    if repr(subject) not in _made:
        _made[repr(subject)] = built(subject)
    return _made[repr(subject)]


RUNNABLE = [
    pytest.param(*option, marks=[pytest.mark.slow] if option in COMPILERS else [])
    for option in OPTIONS
    if not lacking(*option)
]


# ---- the options there are


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("group", "name"), RUNNABLE)
def test_option_computes_the_same_actions(group: str, name: str, model: str):
    instance = made(f"model={model}", f"{group}={name}")
    assert instance.verdict.wrong == []
    # A precision always says which one it is; other plain options leave everything as it is and say nothing.
    assert set(instance.applied) == {"precision"} | ({group} if name != PLAIN[group] else set())
    assert all(instance.applied.values())


@pytest.mark.parametrize(("group", "name"), [option for option in OPTIONS if lacking(*option)])
def test_option_says_what_it_lacks(group: str, name: str):
    # A short form names the setting that it stands for, a set of switches the one that needs it.
    assert all(re.match(rf"{group}: (\w+(=\w+)? )?needs ", reason) for reason in lacking(group, name))
    assert any("no GPU that torch can use" in reason for reason in lacking(group, name))


def test_some_options_run_here_and_some_do_not():
    assert {("attention", "sdpa"), ("image_masking", "skip"), ("precision", "fp32")} <= {p.values for p in RUNNABLE}
    assert lacking("graphs", "manual")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_sdpa_backends_of_a_cpu(model: str, backend: str):
    instance = made(f"model={model}", "attention=sdpa", f"attention.backend={backend}")
    assert instance.verdict.wrong == []
    assert all(backend in line for line in instance.applied["attention"])


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_sdpa_backend_that_cannot_run_is_an_error(backend: str):
    """Not another kernel behind one's back."""
    with pytest.raises(RuntimeError, match="No viable backend"):
        made("model=tiny", "attention=sdpa", f"attention.backend={backend}")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("words", ["attention=sdpa", "image_masking=skip", "attention=sdpa image_masking=skip"])
def test_options_hold_for_a_batch_with_padding_and_absent_cameras(model: str, words: str):
    batch = ("workload=masked", "workload.batch_size=3", "workload.prompt_tokens=12")
    assert made(f"model={model}", *batch, *words.split()).verdict.wrong == []


@pytest.mark.parametrize("model", ["tiny_pi0", "tiny_pi05"])
def test_sdpa_where_every_row_is_masked_differently(model: str):
    """Cameras, too, differ between the rows of these observations."""
    cases = [case for case in BF16_CASES if case.startswith(f"{model}_")]

    def actions(precision: Precision, option: Option) -> list[Tensor]:
        made = []
        for case in cases:
            policy = Policy(load_model(case, precision), noise_of(case).shape[1], num_steps_of(case))
            option.apply(policy)
            made.append(policy.sample_actions(observation_of(case), noise_of(case)))
        return made

    plain, truth = actions(BF16, Eager()), actions(BF16_TRUTH, Eager())
    verdict = judge(actions(BF16, Sdpa()), plain, truth, Numerics.REORDERED, "bf16")
    assert verdict.wrong == []
    assert verdict.metrics["error/ratio_mean"] != 1, "SDPA was not in the way"


@pytest.mark.parametrize("model", MODELS)
def test_fp32_is_close_to_float64(model: str):
    verdict = made(f"model={model}", "precision=fp32").verdict
    assert verdict.wrong == []
    assert 0 < verdict.metrics["error/rel_l2"] < 5e-6
    assert verdict.metrics["error/rel_l2"] == verdict.metrics["error/rel_l2_plain_fp32"]


def test_skip_leaves_out_what_no_row_has():
    given = tiny_observation([(1, 0, 1), (1, 0, 0)], [3, 5])
    left = without_absent_cameras(given)
    assert list(left.images) == ["base_0_rgb", "right_wrist_0_rgb"]
    assert left.cameras_present["right_wrist_0_rgb"] == (True, False)
    assert left.prompt_lengths == given.prompt_lengths
    complete = tiny_observation()
    assert without_absent_cameras(complete) is complete


# ---- single stages


def modules(policy: Policy, stage: str, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for root in policy.stage_modules(stage) for m in root.modules() if isinstance(m, kind)]


def filled(policy: Policy, kind: type[nn.Module], slot: str) -> dict[str, tuple[int, int]]:
    """Stage -> (instances whose slot was filled, instances)."""
    found = {stage: modules(policy, stage, kind) for stage in STAGES}
    return {stage: (sum(slot in vars(m) for m in some), len(some)) for stage, some in found.items()}


@pytest.mark.parametrize("pi05", [False, True])
def test_stages_share_no_module_and_leave_none_out(pi05: bool):
    policy = tiny_policy(pi05)
    for kind in (Attention, Linear):
        by_stage = [module for stage in STAGES for module in modules(policy, stage, kind)]
        everything = [module for module in policy.model.modules() if isinstance(module, kind)]
        assert len(by_stage) == len(everything)
        assert set(map(id, by_stage)) == set(map(id, everything))


def test_option_fills_the_stages_that_are_left_to_it():
    instance = made("model=tiny", "attention=sdpa", "attention.prefill=eager")
    assert instance.verdict.wrong == []
    assert filled(instance.policy, Attention, "attend") == {"vision": (2, 2), "prefill": (0, 3), "denoise": (3, 3)}
    assert [line.split(":")[0] for line in instance.applied["attention"]] == ["vision", "denoise"]


def test_option_of_one_stage_fills_just_that():
    instance = made("model=tiny", "attention.denoise=sdpa")
    assert filled(instance.policy, Attention, "attend") == {"vision": (0, 2), "prefill": (0, 3), "denoise": (3, 3)}


def test_option_of_one_stage_is_held_to_its_own_word():
    """Not to that of the option around it, which is exact."""
    instance = made("model=tiny", "attention.denoise=sdpa")
    assert instance.subject.numerics is Numerics.REORDERED
    assert instance.verdict.wrong == []


def test_stages_keep_their_settings():
    words = ("attention=sdpa", "attention.backend=math", "attention.denoise={name: sdpa, backend: flash}")
    lines = made("model=tiny", *words).applied["attention"]
    assert [(line.split(":")[0], line.split("(")[1]) for line in lines] == [
        ("vision", "math)"),
        ("prefill", "math)"),
        ("denoise", "flash)"),
    ]


def test_classes_stay_as_they_are():
    attend = Attention.attend
    made("model=tiny", "attention=sdpa")
    assert Attention.attend is attend is eager_attend


def test_fill_that_finds_nothing_is_an_error():
    policy = tiny_policy()
    policy.begin("attention")
    with pytest.raises(LookupError, match=r"attention: a toy found no Conv3d\.attend to fill in vision"):
        policy.fill(nn.Conv3d, "attend", eager_attend, ("vision",), "a toy")
    with pytest.raises(AttributeError, match="has no slot 'mix'"):
        policy.fill(Attention, "mix", eager_attend, STAGES, "a toy")
    # The patches of the vision tower are the only convolution: found there, and missed elsewhere.
    with pytest.raises(LookupError, match="to fill in prefill"):
        policy.fill(nn.Conv2d, "padding_mode", "zeros", ("vision", "prefill"), "a toy")


# ---- options that do not keep their word


@dataclass(frozen=True)
class Scaled(Option):
    """Multiplies the actions."""

    factor: float = 1 + 1e-3

    def apply(self, policy: Policy) -> None:
        def scaled(call: DeviceCall) -> DeviceCall:
            return lambda observation, noise_BCA: call(observation, noise_BCA) * self.factor

        policy.wrap_call(scaled, f"{self.factor} x")


@dataclass(frozen=True)
class Reordered(Scaled):
    numerics = Numerics.REORDERED


@dataclass(frozen=True)
class Approximate(Scaled):
    numerics = Numerics.APPROXIMATE


Attend = Callable[[Tensor, Tensor, Tensor, Mask | None, float], Tensor]


@dataclass(frozen=True)
class Attending(StagedOption):
    """Any attention, declared a reordering."""

    numerics = Numerics.REORDERED
    attend: Attend = eager_attend

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        policy.fill(Attention, "attend", self.attend, stages, "a toy")


@dataclass(frozen=True)
class Eps(Option):
    """Another epsilon in every norm."""

    numerics = Numerics.REORDERED

    def apply(self, policy: Policy) -> None:
        for module in policy.model.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-5
        policy.note("eps 1e-5")


def blind_to_masks(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float) -> Tensor:
    return eager_attend(q_BTNH, k_BSKH, v_BSKH, None, scale)


def blind_to_padding(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask | None, scale: float) -> Tensor:
    """Knows which tokens the state token may see, but takes padding and absent cameras for real."""
    if mask is not None:
        mask = Mask(torch.ones_like(mask.keys_BS), mask.num_queries, full=True, blind=mask.blind)
    return eager_attend(q_BTNH, k_BSKH, v_BSKH, mask, scale)


def scaled_by(factor: float) -> Attend:
    return lambda q, *rest: eager_attend(factor * q, *rest)


def wrong(model: str, *words: str, **options: Option) -> list[str]:
    return built(with_option(few_steps(f"model={model}", *words), **options)).verdict.wrong


@pytest.mark.parametrize("model", MODELS)
def test_toy_that_changes_nothing_is_right(model: str):
    """So what is found below is found because of the mistake."""
    assert wrong(model, attention=Attending(), fusion=Scaled(factor=1.0), graphs=Reordered(factor=1.0)) == []


def test_exact_option_that_is_not_is_named():
    found = wrong("tiny", fusion=Scaled())
    assert len(found) == 2
    assert found[0].startswith("fusion declared EXACT, but changed 8 of 8 observations' actions")
    assert found[1].startswith("the whole stack declared EXACT")


def test_exact_option_behind_another_is_compared_with_that():
    """SDPA has moved the actions already; only the option behind it broke its word."""
    found = wrong("tiny", "attention=sdpa", graphs=Scaled(factor=1 + 2**-20))
    assert len(found) == 1
    assert found[0].startswith("graphs declared EXACT")


@pytest.mark.parametrize(
    ("words", "options", "calls"),
    [
        (["attention=sdpa", "fusion=projections"], {}, [1, 1, 2]),  # compared as a whole, at the end
        (["attention=sdpa"], {"graphs": Scaled(factor=1.0)}, [1, 2, 1, 2]),  # EXACT: before it and after it
        ([], {"graphs": Scaled(factor=1.0)}, [1, 2]),  # before it there is the plain model
        ([], {}, []),
    ],
)
def test_only_what_is_compared_is_computed(words: list[str], options: dict[str, Option], calls: list[int]):
    stack = with_option(few_steps(*words), **options).stack
    asked: list[int] = []

    def run(few: int) -> list[Tensor]:
        asked.append(few)
        return [torch.zeros(1)] * few

    checked = apply_checked(tiny_policy(), stack, run, [torch.zeros(1)] * 2, lambda text: None)
    assert (asked, checked.failures, len(checked.found)) == (calls, [], 2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attend", [blind_to_masks, blind_to_padding])
def test_dropped_masks_are_found(model: str, attend: Attend):
    """Although the workload itself, three cameras and no padding, would not show it."""
    assert any("in the geometric mean" in text for text in wrong(model, attention=Attending(attend=attend)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", ["prefill", "denoise"])
def test_dropped_masks_of_one_stage_are_found(model: str, stage: str):
    assert wrong(model, attention=Eager(**{stage: Attending(attend=blind_to_padding)}))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_attention_scale_off_by_2_percent_is_found(model: str, factor: float):
    """By the mean, limit 1.25: it makes 1.4 to 1.7 x the error. By single observations, limit 2, only now and then."""
    found = wrong(model, "workload.num_steps=10", attention=Attending(attend=scaled_by(factor)))
    assert any("in the geometric mean" in text for text in found)


@pytest.mark.parametrize("model", MODELS)
def test_attention_scale_off_by_2_percent_is_found_in_batches(model: str):
    assert wrong(model, "workload.batch_size=3", attention=Attending(attend=scaled_by(1.02)))


def test_one_wrong_observation_is_found():
    """Wrong only where a camera is absent and the prompt padded, as in two of the eight."""

    @dataclass(frozen=True)
    class Sometimes(Option):
        numerics = Numerics.REORDERED

        def apply(self, policy: Policy) -> None:
            def wrapped(call: DeviceCall) -> DeviceCall:
                def sometimes(observation, noise_BCA):
                    structure = observation.structure
                    broken = not structure.prompt_full and dict(structure.cameras)["left_wrist_0_rgb"] == "none"
                    return call(observation, noise_BCA) * (1.05 if broken else 1.0)

                return sometimes

            policy.wrap_call(wrapped, "a toy")

    found = wrong("tiny", graphs=Sometimes())
    assert any("on one observation" in text for text in found)


def test_actions_that_are_not_finite_are_wrong():
    assert wrong("tiny", graphs=Reordered(factor=float("nan"))) == ["the actions are not finite"]
    assert "the actions are not finite" in wrong("tiny", graphs=Scaled(factor=float("nan")))


def test_approximate_option_passes_and_shows_its_error():
    verdict = built(with_option(few_steps("model=tiny"), graphs=Approximate(factor=1.1))).verdict
    assert verdict.wrong == []
    assert verdict.metrics["error/rel_l2"] == pytest.approx(0.1, rel=0.05)
    assert verdict.metrics["error/ratio_max"] > 2
    assert verdict.metrics["error/max_abs"] > 0.1


def test_approximate_option_keeps_the_bound_it_states():
    @dataclass(frozen=True)
    class Bounded(Approximate):
        bound = 0.05

    assert wrong("tiny", graphs=Bounded(factor=1.01)) == []
    (text,) = wrong("tiny", graphs=Bounded(factor=1.1))
    assert "above the bound 0.05" in text
    stack = replace(few_steps("model=tiny").stack, graphs=Bounded())
    assert build.bound(stack) == 0.05
    assert build.bound(replace(stack, fusion=Bounded())) == 0.1
    assert build.bound(replace(stack, fusion=Approximate())) is None
    assert build.bound(replace(stack, graphs=Scaled())) is None


@pytest.mark.parametrize("model", MODELS)
def test_wrong_epsilon_is_found_in_fp32(model: str):
    """It makes 8e-6 and more; bf16 would hide it."""
    (text,) = wrong(model, "precision=fp32", fusion=Eps())
    assert "above the limit 5e-06 of fp32" in text


# ---- what options declare


def test_stack_speaks_with_its_weakest_option():
    stack = few_steps("model=tiny").stack
    assert build.numerics(stack) is Numerics.EXACT
    assert build.numerics(replace(stack, attention=Sdpa())) is Numerics.REORDERED
    assert build.numerics(replace(stack, attention=Eager(vision=Sdpa()))) is Numerics.REORDERED
    assert build.numerics(replace(stack, attention=Sdpa(Eager(), Eager(), Eager()))) is Numerics.EXACT
    assert build.numerics(replace(stack, attention=Sdpa(), graphs=Approximate())) is Numerics.APPROXIMATE


def test_only_the_stages_that_use_it_have_to_prove_it():
    stack = config.stack(plain_config("attention=sdpa", "attention.denoise=eager", "graphs=manual"))
    assert [group for group, _ in build.proofs(stack)] == ["attention", "graphs"]
    stack = config.stack(plain_config("attention.denoise=sdpa"))
    assert [group for group, _ in build.proofs(stack)] == ["attention.denoise"]


H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90", memory_mb=143771)
MI350 = Machine(gpu="AMD Instinct MI350X", vendor="amd", arch="gfx950")


@pytest.mark.parametrize(
    ("needs", "machine", "reason"),
    [
        (ANY_GPU, HOST, "needs a GPU of nvidia or amd; this machine has no GPU that torch can use"),
        (ANY_GPU, H200, None),
        (ANY_GPU, MI350, None),
        (Requires(vendors=("amd",)), H200, "needs a GPU of amd; this machine has NVIDIA H200"),
        (
            Requires(vendors=("nvidia",), archs=("sm_100",)),
            H200,
            "needs the architecture sm_100; this machine has NVIDIA H200 (sm_90)",
        ),
        (Requires(vendors=("nvidia",), archs=("sm_90", "sm_100")), H200, None),
        (Requires(packages=("torch>=2",)), HOST, None),
        (Requires(packages=("torch>=99",)), HOST, "needs the package torch>=99; "),
        (
            Requires(packages=("no-such-package>=1",)),
            HOST,
            "needs the package no-such-package>=1, which is not installed",
        ),
    ],
)
def test_needs(needs: Requires, machine: Machine, reason: str | None):
    found = needs.unmet(machine)
    assert len(found) == (reason is not None)
    assert all(text.startswith(str(reason)) for text in found)


def test_options_that_exclude_each_other_say_so():
    @dataclass(frozen=True)
    class Jealous(Option):
        def clashes(self, stack: config.Stack) -> list[str]:
            return [] if stack.attention == Eager() else ["mixes by itself; leave attention=eager"]

    stack = replace(few_steps("model=tiny").stack, fusion=Jealous())
    assert build.unmet(stack, HOST) == []
    assert build.unmet(replace(stack, attention=Sdpa()), HOST) == ["fusion: mixes by itself; leave attention=eager"]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_options_are_frozen(group: str, name: str):
    option = config.option(group, plain_config(f"{group}={name}")[group])
    for field in fields(option):
        with pytest.raises(AttributeError):
            setattr(option, field.name, None)
