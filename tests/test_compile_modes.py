"""What is compiled, how often, and that limits and unknown settings are errors.

Where only Dynamo matters the backend is `eager`: it traces and guards as ever, and generates no code.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor import list_mode_options, list_options
from torch._inductor.utils import run_and_get_code

from pi0exp import build, config
from pi0exp.compile_mode import inductor
from pi0exp.compile_mode.default import Default
from pi0exp.compile_mode.inductor import Compiled, Region
from pi0exp.compile_mode.max_autotune import MaxAutotune, MaxAutotuneNoGraphs
from pi0exp.compile_mode.reduce_overhead import UNVERIFIED_ON_AMD, ReduceOverhead
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.model.observation import Observation
from pi0exp.model.precision import BF16, FP32
from pi0exp.policy import Policy
from pi0exp.policy_subject import run as actions_of
from pi0exp.verify import rel_l2

MODES = ("default", "reduce_overhead", "max_autotune", "max_autotune_no_graphs", "aggressive")
CAPTURING = ("reduce_overhead", "max_autotune")
GPU = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")
SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(autouse=True)
def _dynamo_as_it_was() -> Iterator[None]:
    """Its settings, counters and compiled functions are the process's."""
    with torch._dynamo.config.patch():
        yield
        torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile without code generation; the settings that it was called with."""
    compiled, asked = torch.compile, []

    def trace(function: Any, *, options: dict[str, Any] | None, **rest: Any) -> Any:
        asked.append(options or {})
        return compiled(function, backend="eager", **rest)

    monkeypatch.setattr(torch, "compile", trace)
    return asked


def applied(option: Compiled, pi05: bool = False) -> Policy:
    policy = tiny_policy(pi05)
    policy.begin("compile_mode")
    option.apply(policy)
    return policy


GIVEN = [
    tiny_observation([(1, 1, 1)], [8], seed=1),
    tiny_observation([(1, 0, 1)], [8], seed=2),
    tiny_observation([(1, 1, 1), (0, 0, 1)], [8, 3], seed=3),
]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("region", "pi05"),
    [
        (Region.stage, False),
        (Region.block, True),
        pytest.param(Region.stage, True, marks=pytest.mark.slow),
        pytest.param(Region.block, False, marks=pytest.mark.slow),
    ],
)
def test_each_shape_compiles_once(region: Region, pi05: bool):
    """Vision, prefill and the step; or the first block and the others of vision, prefill and expert."""
    policy, plain = applied(Default(region=region), pi05), tiny_policy(pi05)
    # `begin` only passes on what it is given, so that there is no graph of it.
    expected = 3 if region is Region.stage else 6
    before = policy.counters()
    for number, given in enumerate((GIVEN[0], GIVEN[2]), 1):
        for _ in range(2):
            noise_BCA = noise_for(plain, given)
            actions_BCA = policy.sample_actions(given, noise_BCA)
            assert torch.equal(actions_BCA, plain.sample_actions(given, noise_BCA))
        found = policy.counters()
        assert found["compile/graphs"] - before["compile/graphs"] == number * expected
        assert found["compile/breaks"] == before["compile/breaks"]
    assert found["startup_s/compile"] > 0
    assert found["compile/recompiles"] > 0


@pytest.mark.usefixtures("traced")
def test_depth_does_not_matter_to_blocks():
    """All blocks share what was compiled for the first two."""
    counts = []
    for depth in (2, 5):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        words = (f"model.{stack}.depth={depth}" for stack in ("vision", "paligemma", "expert"))
        made = subject_of("model=tiny", "compile_mode=default", "compile_mode.region=block", *words)
        policy = made.policy(torch.device("cpu"))
        policy.sample_actions(*made.on_device(made.inputs(1).items, torch.device("cpu"))[0])
        counts.append(policy.counters()["compile/graphs"] - before)
    assert counts == [6, 6]


MANY = [tiny_observation([(1, 1, 1)] * batch, [8] * batch) for batch in (2, 3, 4, 5)]
"""More shapes than blocks may be compiled for where one structure is allowed."""


def call_all(policy: Policy, given: list[Observation]) -> None:
    for one in given:
        policy.sample_actions(one)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("region", [Region.stage, pytest.param(Region.block, marks=pytest.mark.slow)])
def test_more_structures_than_allowed_are_an_error(region: Region):
    policy = applied(Default(region=region, max_structures=1))
    policy.sample_actions(GIVEN[0])
    with pytest.raises(FailOnRecompileLimitHit):
        call_all(policy, MANY)


@pytest.mark.usefixtures("traced")
def test_step_is_compiled_once_for_any_noise():
    """The first step's noise is the caller's tensor, that of later steps was computed."""
    policy = applied(Default())
    policy.sample_actions(GIVEN[0], noise_for(policy, GIVEN[0]))
    assert policy.counters()["compile/recompiles"] == 0


@pytest.mark.usefixtures("traced")
def test_breaks_are_counted_where_they_are_allowed():
    policy = tiny_policy()
    policy.begin("toy")
    policy.wrap_stage("denoise", lambda step: lambda *args: (torch._dynamo.graph_break(), step(*args))[1], "a break")
    Default(fullgraph=False).apply(policy)
    policy.sample_actions(GIVEN[0])
    assert policy.counters()["compile/breaks"] > 0


# ---- single stages


def test_stages_may_have_modes_of_their_own(traced: list[dict[str, Any]]):
    words = ("compile_mode.denoise=max_autotune_no_graphs", "compile_mode.vision=none")
    policy = applied(option_of("default", *words))
    lines = [line for line in policy.applied["compile_mode"] if "torch.compile" in line]
    assert [line.partition(":")[0] for line in lines] == ["prefill", "denoise", "denoise"]
    assert ["max-autotune" in line for line in lines] == [False, True, True]
    # The prefill with no settings, both functions of the steps with those of their mode.
    assert traced == [{}, *[list_mode_options("max-autotune-no-cudagraphs")] * 2]
    before, plain = policy.counters(), tiny_policy()
    noise_BCA = noise_for(plain, GIVEN[0])
    assert torch.equal(policy.sample_actions(GIVEN[0], noise_BCA), plain.sample_actions(GIVEN[0], noise_BCA))
    assert policy.counters()["compile/graphs"] - before["compile/graphs"] == 2


@pytest.mark.usefixtures("traced")
def test_only_the_steps_are_compiled():
    option = config.stack(plain_config("compile_mode=none", "compile_mode.denoise=default")).compile_mode
    policy = applied(option)
    before = policy.counters()["compile/graphs"]
    policy.sample_actions(GIVEN[0])
    assert policy.counters()["compile/graphs"] - before == 1
    assert policy.applied["compile_mode"][-1].startswith("sample_actions -> noise")


@pytest.mark.usefixtures("traced")
def test_blocks_of_one_stage_leave_those_of_others():
    """The blocks of prefill and denoising are of one class: what wraps the one's must not reach the other's."""
    option = config.stack(
        plain_config("compile_mode=none", "compile_mode.denoise={name: default, region: block}")
    ).compile_mode
    policy = applied(option)
    before = policy.counters()["compile/graphs"]
    policy.sample_actions(GIVEN[0])
    assert policy.counters()["compile/graphs"] - before == 2, "the first block, and all others"


@pytest.mark.usefixtures("traced")
def test_a_stage_that_captures_makes_the_call_a_generation(monkeypatch: pytest.MonkeyPatch):
    policy, marks = applied(option_of("default", "compile_mode.vision=reduce_overhead")), []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(policy.model, "sample_actions", lambda *args: torch.zeros(1))
    policy.sample_actions(GIVEN[0])
    assert marks == [1]
    assert "startup_s/record" in policy.counters()


def test_a_stage_that_captures_clashes_with_graphs():
    words = ("compile_mode=default", "compile_mode.vision=reduce_overhead", "graphs=manual")
    (reason,) = build.unmet(config.stack(plain_config(*words)), GPU)
    assert reason.startswith("compile_mode.vision: captures twice")


# ---- settings


def option_of(name: str, *words: str) -> Compiled:
    option = config.stack(plain_config(f"compile_mode={name}", *words)).compile_mode
    assert isinstance(option, Compiled)
    return option


@pytest.mark.parametrize("name", MODES)
def test_every_setting_is_one_of_inductor(name: str):
    assert set(option_of(name).settings()) <= set(list_options())


@pytest.mark.parametrize("name", MODES)
def test_settings_reach_every_compiled_function(name: str, traced: list[dict[str, Any]]):
    option = option_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = applied(option)
    assert traced == [option.settings()] * 4
    assert any(option.mode in line for line in policy.applied["compile_mode"])


def test_modes_are_those_of_pytorch():
    assert Default().settings() == list_mode_options("default") == {}
    for option in (ReduceOverhead(), MaxAutotune()):
        expected = {**list_mode_options(option.mode), "triton.cudagraph_or_error": True}
        assert option.settings() == expected
        assert expected["triton.cudagraphs"] is True
    assert MaxAutotuneNoGraphs().settings() == list_mode_options("max-autotune-no-cudagraphs")
    assert "triton.cudagraphs" not in MaxAutotuneNoGraphs().settings()


@pytest.mark.parametrize("name", MODES)
def test_dependent_launches_are_one_setting_more(name: str, traced: list[dict[str, Any]]):
    option = option_of(name, "compile_mode.dependent_launches=true")
    assert option.settings() == {**option_of(name).settings(), "triton.enable_pdl": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = [line for line in applied(option).applied["compile_mode"] if "torch.compile" in line]
    assert traced == [option.settings()] * 4
    assert all("dependent launches" in line for line in lines)


@pytest.mark.parametrize("name", MODES)
def test_dependent_launches_are_refused_where_inductor_would_make_none(name: str):
    words = (f"compile_mode={name}", "compile_mode.dependent_launches=true")
    stack = config.stack(plain_config(*words))
    assert build.unmet(stack, GPU) == []
    for gpu, vendor, arch in (("NVIDIA A100", "nvidia", "sm_80"), ("AMD Instinct MI350X", "amd", "gfx950")):
        (reason,) = build.unmet(stack, Machine(gpu=gpu, vendor=vendor, arch=arch))
        assert reason.startswith("compile_mode: dependent_launches needs")
        assert gpu in reason
    (reason,) = build.unmet(stack, Machine(gpu="CPU", vendor="cpu", arch=""))
    assert "no GPU that torch can use" in reason


def test_dependent_launches_are_refused_by_a_compiler_without_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inductor, "list_options", lambda: ["max_autotune"])
    with pytest.raises(UserError, match=r"dependent_launches: triton\.enable_pdl is no setting") as caught:
        option_of("default", "compile_mode.dependent_launches=true")
    assert "\n" not in str(caught.value)


def test_aggressive_names_its_settings():
    lines = [line for line in applied(option_of("aggressive")).applied["compile_mode"] if "torch.compile" in line]
    assert len(lines) == 4
    assert all("aggressive_fusion=True" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["compile_mode=default", "compile_mode.max_structures=0"], "compile_mode.max_structures is 0"),
        (["compile_mode=default", "compile_mode.region=layer"], "compile_mode.region"),
        (
            ["compile_mode=aggressive", "+compile_mode.options.no_such_fusion=true"],
            "options.no_such_fusion is no setting",
        ),
        (["compile_mode=aggressive", "~compile_mode.options"], "options is empty"),
    ],
)
def test_wrong_settings_are_told_in_one_line(words: list[str], reason: str):
    with pytest.raises(UserError, match=reason) as caught:
        config.stack(plain_config(*words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("graphs", ["none", "manual", "split"])
def test_modes_with_graphs_of_their_own_clash_with_graphs(name: str, graphs: str):
    reasons = build.unmet(config.stack(plain_config(f"compile_mode={name}", f"graphs={graphs}")), GPU)
    if name in CAPTURING and graphs != "none":
        assert len(reasons) == 1
        assert reasons[0].startswith("compile_mode: captures twice")
    else:
        assert reasons == []


@pytest.mark.parametrize("name", MODES)
def test_modes_prove_what_they_do(name: str):
    kernels = [r"^triton_", r"(cuda|hip)GraphLaunch"]
    assert option_of(name).proofs() == (kernels if name in CAPTURING else kernels[:1])


# ---- CUDA graphs of Inductor


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("option", [ReduceOverhead(), MaxAutotune()], ids=repr)
def test_each_call_is_one_generation_and_its_actions_are_copied(option: Compiled, monkeypatch: pytest.MonkeyPatch):
    policy, marks = applied(option), []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    # The memory of a graph, which the next replay overwrites.
    static_BCA = torch.zeros(1, policy.horizon, policy.model.config.action_dim)
    monkeypatch.setattr(policy.model, "sample_actions", lambda *args: static_BCA.add_(1))
    first_BCA, second_BCA = (policy.sample_actions(GIVEN[0]) for _ in range(2))
    assert len(marks) == 2
    assert (first_BCA == 1).all()
    assert (second_BCA == 2).all()


@pytest.mark.usefixtures("traced")
def test_modes_without_graphs_mark_nothing(monkeypatch: pytest.MonkeyPatch):
    policy, marks = applied(Default()), []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(policy.model, "sample_actions", lambda *args: torch.zeros(1))
    policy.sample_actions(GIVEN[0])
    assert not marks


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("option", [ReduceOverhead(), MaxAutotune()], ids=repr)
def test_amd_is_warned_of(option: Compiled, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(UserWarning, match="unverified on AMD"):
        policy = applied(option)
    assert UNVERIFIED_ON_AMD in policy.applied["compile_mode"]


def test_clock_reports_recordings_only_where_there_are_any():
    names = {"compile/recordings", "compile/cudagraph_skips", "startup_s/record"}
    assert names <= set(inductor.CompileClock(captures=True).counters())
    assert not names & set(inductor.CompileClock(captures=False).counters())


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("region", ["stage", "block"])
@pytest.mark.parametrize("words", [*(f"compile_mode={name}" for name in MODES), "compile_mode=default graphs=split"])
def test_mode_on_a_gpu(words: str, region: str):
    made = subject_of(*SHALLOW, "attention=sdpa", *words.split(), f"compile_mode.region={region}")
    instance = made.build(torch.device("cuda", 0), 8, lambda text: None)
    assert instance.verdict.wrong == []
    counters = instance.counters()
    assert counters["compile/breaks"] == 0
    assert counters["startup_s/compile"] > 0
    if "compile/recordings" in counters:
        assert counters["compile/recordings"] > 0
        assert counters["compile/cudagraph_skips"] == 0


@pytest.mark.gpu
@needs_gpu
def test_dependent_launches_on_a_gpu():
    """Short kernels, of which each reads what the two in front of it write, and a product among them: as without."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")

    def chain(x_MN: torch.Tensor, w_NN: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            for _ in range(4):  # along one axis and along the other, which no kernel does at once
                across_MN = torch.softmax(x_MN, -1)
                x_MN = across_MN + 512 * torch.softmax(8 * across_MN, 0)
            x_MN = x_MN @ w_NN
        return x_MN

    x_MN, w_NN = torch.randn(64, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    both = [Default(dependent_launches=asked).settings() for asked in (False, True)]
    ordinary, dependent = (torch.compile(chain, options=settings or None, dynamic=False) for settings in both)
    _, (code,) = run_and_get_code(dependent, x_MN, w_NN)
    assert code.count("gdc_wait") > 1
    for seed in range(20):
        torch.manual_seed(seed)
        x_MN = torch.randn(64, 512, device="cuda")
        assert torch.equal(ordinary(x_MN, w_NN), dependent(x_MN, w_NN))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("region", ["stage", "block"])
def test_held_actions_and_keys_outlive_inductors_graphs(region: str):
    """Different observations back to back, held until the end: what is overwritten becomes another's actions."""
    device = torch.device("cuda", 0)
    made = subject_of(*SHALLOW, "attention=sdpa", "compile_mode=reduce_overhead", f"compile_mode.region={region}")
    given = made.on_device(made.inputs(8).items, device)
    plain, truth = (actions_of(made.plain_policy(p, device), given) for p in (BF16, FP32))
    policy = made.policy(device)
    for _ in range(3):  # warm-up, recording, replay
        held = [policy.sample_actions(*one) for one in given]
    for held_BCA, plain_BCA, truth_BCA in zip(held, plain, truth, strict=True):
        assert rel_l2(held_BCA.cpu(), truth_BCA)[0] <= 2 * rel_l2(plain_BCA, truth_BCA)[0]
