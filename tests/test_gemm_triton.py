"""gemm=triton: every form of launch, the slots of the tiny models, mistakes that must be found, and its configuration.

Kernels run under Triton's interpreter, which is chosen at import: in a process of its own, this file run as a program.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import interpreter
import pytest
import torch
from helpers import CPU, noise_for, plain_config, tiny_observation
from interpreter import interprets
from torch import Tensor

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.fusion.fusion import Fusion
from pi0exp.gemm.triton_gemm import Products, TritonGemm
from pi0exp.kernels import gemm, gemm_cases, gemm_epilogue, kernel, skinny_gemm
from pi0exp.kernels.skinny_gemm import COUNTERS, Launch
from pi0exp.machine import Machine
from pi0exp.model.config import tiny
from pi0exp.model.precision import BF16, BF16_TRUTH, Precision
from pi0exp.model.weights import build as built_model
from pi0exp.model.weights import random_source
from pi0exp.option import STAGES, Numerics
from pi0exp.policy import Policy
from pi0exp.verify import judge

CHECKS: dict[str, Callable[[], str]] = {}
"""Name -> a check that runs under the interpreter and says what is wrong, "" if nothing is."""


def check(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def keep(function: Callable[[], str]) -> Callable[[], str]:
        assert name not in CHECKS
        CHECKS[name] = function
        return function

    return keep


# ---- every form of launch, whatever the table has for a shape

LAUNCHES = {
    "stream": Launch(32, 16),
    "stream, x left": Launch(16, 16, X_LEFT=True),
    "stream, groups": Launch(16, 16, GROUPS=2),
    "stream, splits": Launch(16, 16, SPLITS=3),
    "held": Launch(32, 32, HELD=True),
    "held, x left, splits": Launch(16, 16, SPLITS=2, HELD=True, X_LEFT=True),
    "held, groups": Launch(16, 16, GROUPS=4, HELD=True),
    "held, groups, splits": Launch(16, 16, GROUPS=2, SPLITS=2, HELD=True),
}
SIZES = {"even": (11, 32, 64), "odd": (19, 37, 45), "wide": (40, 24, 80)}


def compared(launch: Launch, M: int, N: int, K: int, gated: bool) -> str:
    """What is wrong with a launch, by the rule for kernels, and with its counters and its repetition."""
    case = gemm_cases.case("", M, N, K, bias=True, residual=True, scale_rows=1, activation="gelu_tanh", gated=gated)
    x, weight, bias, residual, scale, activation, _ = arguments = kernel.arguments_of(case, CPU)
    counters = torch.zeros(COUNTERS, dtype=torch.int32)

    def call() -> Tensor:
        y = x.new_empty(M, N)
        return skinny_gemm.launched(
            launch, x, weight, counters, y, bias, residual, scale, M, activation, gated
        )  # fmt: skip

    found, again = call(), call()
    exact = gemm_epilogue.reference(*map(kernel.double, arguments))
    reasons = [kernel.compare("y", found, gemm_epilogue.reference(*arguments), exact).wrong]
    reasons += ["counters are left" * bool(counters.any()), "not repeatable" * (not torch.equal(found, again))]
    return "; ".join(filter(None, reasons))


for name, launch in LAUNCHES.items():
    for size, shape in SIZES.items():
        for gated in (False, True):
            check(f"launch: {name}; {size}{', gated' * gated}")(
                lambda launch=launch, shape=shape, gated=gated: compared(launch, *shape, gated)  # type: ignore[misc]
            )


@check("launch: one that leaves out a part of K is found")
def _() -> str:
    class Short(Launch):
        def constants(self, K: int) -> dict[str, object]:
            return super().constants(K) | {"STEPS": 1}

    return "" if "allowed" in compared(Short(32, 16), 11, 32, 64, False) else "not found"


# ---- the tiny models


def judged(pi05: bool, option: TritonGemm, stages: tuple[str, ...] = STAGES, fusion: Fusion | None = None) -> list[str]:
    """What the verification finds wrong: two observations, one a batch with padding and absent cameras; one step."""
    cfg = tiny(pi05)
    given = [
        tiny_observation(config=cfg),
        tiny_observation([(1, 0, 1), (1, 1, 0)], [3, 8], seed=1, config=cfg),
    ]

    def actions(precision: Precision, changes: Callable[[Policy], None]) -> list[Tensor]:
        policy = Policy(built_model(cfg, precision, random_source(cfg, 0, CPU), CPU), 10, 1)
        changes(policy)
        return [policy.sample_actions(one, noise_for(policy, one)) for one in given]

    def optimized(policy: Policy) -> None:
        policy.begin("fusion")
        (fusion or Fusion()).apply(policy)
        policy.begin("gemm")
        option.apply_to(policy, stages)

    plain, truth = (actions(precision, lambda policy: None) for precision in (BF16, BF16_TRUTH))
    verdict = judge(actions(BF16, optimized), plain, truth, Numerics.REORDERED, "bf16")
    assert verdict.metrics["error/ratio_mean"] != 1, "nothing was in the way"
    return verdict.wrong


MERGED = Fusion(gate_up=True)
BOTH = TritonGemm(activation=True, residual=True)
for name, arguments in {
    "pi0": (False, TritonGemm()),
    "pi0, activation and residual": (False, BOTH, STAGES, MERGED),
    "pi05, activation and residual": (True, BOTH, STAGES, MERGED),
    "pi05, denoise by the kernel for many rows": (True, TritonGemm(max_skinny_rows=0, residual=True), ("denoise",)),
}.items():
    check(f"model: {name}")(lambda arguments=arguments: "; ".join(judged(*arguments)))  # type: ignore[misc]


def forgetting(*, bias: bool = False, **forgotten: object) -> Callable[..., Tensor]:
    """`Products.product` with arguments replaced."""
    product = Products.product

    def wrong(self: Products, x: Tensor, weight: Tensor, given: Tensor | None, **more: object) -> Tensor:
        changed = {key: value for key, value in forgotten.items() if key in more}
        return product(self, x, weight, None if bias else given, **{**more, **changed})  # type: ignore[arg-type]

    return wrong


for name, wrong, arguments in (
    ("the bias", forgetting(bias=True), (False, TritonGemm(), ("vision",))),
    ("the residual", forgetting(residual=None), (False, TritonGemm(residual=True), ("denoise",))),
    ("the gate of the branch", forgetting(scale=None), (True, TritonGemm(residual=True), ("denoise",))),
    ("GELU", forgetting(activation="none"), (False, TritonGemm(activation=True), ("denoise",), MERGED)),
):

    def found(wrong=wrong, arguments=arguments) -> str:  # type: ignore[no-untyped-def]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Products, "product", wrong)
            return "" if judged(*arguments) else "not found"

    check(f"mistake: {name} forgotten")(found)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str]:
    """Name of a check -> what was wrong, from a process under the interpreter, of the checks that were asked for."""
    return dict(interpreter.lines(Path(__file__), *interpreter.asked(request, "name"), timeout_s=540))


SLOW = (
    "model: pi0",
    "model: pi0, activation and residual",
    "model: pi05, activation and residual",
    "mistake: the bias forgotten",
)
"""Of all stages, or of pictures: ten seconds each."""


@interprets
@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in CHECKS])
def test_under_the_interpreter(name: str, outcomes: dict[str, str]):
    assert outcomes[name] == ""


# ---- configuration


def clashes(*words: str) -> list[str]:
    stack = config.stack(plain_config(*words))
    return [reason for reason in build.unmet(stack, Machine()) if "needs a GPU" not in reason]


TOGETHER = "activation and fusion.activation compute the same; switch one of them off"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["gemm=triton"], []),
        (["gemm=triton", "gemm.activation=true", "fusion=projections"], []),
        (["gemm=triton", "gemm.activation=true"], ["gemm: activation needs fusion.gate_up"]),
        (["gemm=triton", "gemm.activation=true", "fusion=kernels"], [f"gemm: {TOGETHER}"]),
        (["gemm=triton", "gemm.activation=true", "fusion=kernels", "fusion.activation=false"], []),
        (["gemm.vision={name: triton, activation: true}"], []),
        (["gemm.denoise={name: triton, activation: true}"], ["gemm.denoise: activation needs fusion.gate_up"]),
        (
            ["gemm=triton", "precision=fp32"],
            ["gemm: products of float32 stay with BLAS, and this precision has no others"],
        ),
    ],
)
def test_what_it_cannot_stand_beside(words: list[str], wanted: list[str]):
    assert clashes(*words) == wanted


@pytest.mark.parametrize("rows", [-1, 65])
def test_rows_that_the_kernel_cannot_do_are_refused(rows: int):
    with pytest.raises(UserError, match=f"gemm.max_skinny_rows is {rows}; it must be 0 to 64"):
        config.stack(plain_config("gemm=triton", f"gemm.max_skinny_rows={rows}"))


def test_stages_and_float32_are_told():
    cfg = tiny()
    policy = Policy(built_model(cfg, BF16, random_source(cfg, 0, CPU), CPU), 10, 1)
    policy.begin("gemm")
    BOTH.apply_to(policy, ("vision", "denoise"))
    lines = policy.applied["gemm"]
    assert {line.split(":")[0] for line in lines} == {"vision", "denoise"}
    assert sum("float32 stay with BLAS" in line for line in lines) == 1  # the projections around the expert
    assert sum("hidden" in line for line in lines) == sum("join" in line for line in lines) == 2


# ---- the ops and the table


def test_rows_of_the_table_fit_their_shapes():
    """No masks, no part of K left over, counters for every tile of N."""
    for (_, rows, C, K), launch in skinny_gemm.LAUNCH.items():
        assert launch.constants(K)["EVEN_K"], (C, K, launch)
        assert rows in (16, 32, 64)
        assert C % launch.BN == 0
        assert C // launch.BN <= COUNTERS
        assert not (launch.X_LEFT and launch.GROUPS > 1)


def test_shapes_find_their_rows():
    row = skinny_gemm.LAUNCH["sm_90", 64, 2560, 1024]
    assert skinny_gemm.launch_for("sm_90", torch.bfloat16, 51, 2560, 1024) is row
    assert skinny_gemm.launch_for("sm_90", torch.bfloat16, 20, 2560, 1024) is row
    assert skinny_gemm.launch_for("sm_90", torch.float32, 51, 2560, 1024) is skinny_gemm.FLOAT32
    assert skinny_gemm.launch_for("gfx950", torch.bfloat16, 51, 2560, 1024) is skinny_gemm.OTHERS
    down = gemm.LAUNCH["sm_90", 2048, 16384]
    assert gemm.launch_for("sm_90", torch.bfloat16, 788, 2048, 16384, False) is down
    assert gemm.launch_for("sm_90", torch.bfloat16, 768, 1216, 1152, False) is gemm.SMALL
    assert gemm.launch_for("sm_100", torch.bfloat16, 788, 32768, 2048, True) is gemm.LARGE
    assert gemm.launch_for("gfx942", torch.bfloat16, 788, 32768, 2048, True) is gemm.AMD[True]


GOOD = {"x": torch.ones(4, 32).bfloat16(), "weight": torch.ones(16, 32).bfloat16()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(4, 31).bfloat16()}, "the last axes differ"),
        ({"x": torch.ones(4, 32)}, "wanted bfloat16, float16 or float32 for both"),
        ({"x": torch.ones(4, 32).double(), "weight": torch.ones(16, 32).double()}, "x is torch.float64"),
        ({"activation": "relu"}, "choose one of none, gelu_tanh, silu"),
        ({"bias": torch.ones(15).bfloat16()}, r"bias is not \[16\]"),
        ({"residual": torch.ones(4, 15).bfloat16()}, r"residual is not \[4, 16\]"),
        ({"scale": torch.ones(1, 16).bfloat16()}, "scale without residual"),
        (
            {"scale": torch.ones(3, 16).bfloat16(), "residual": torch.ones(4, 16).bfloat16()},
            r"scale is not \[G, 16\] with G a divisor of 4",
        ),
        ({"weight": torch.ones(32, 16).bfloat16().T}, "must be contiguous"),
        ({"weight": torch.ones(15, 32).bfloat16(), "gated": True}, "even number of rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed: dict[str, object], message: str):
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        gemm.gemm(**{**GOOD, **changed})
    with pytest.raises(ValueError, match=message):
        skinny_gemm.skinny_gemm(**{**GOOD, "counters": counters, **changed})


def test_skinny_gemm_refuses_many_rows_and_other_counters():
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    with pytest.raises(ValueError, match="x has 65 rows; skinny_gemm takes at most 64"):
        skinny_gemm.skinny_gemm(torch.ones(65, 32).bfloat16(), GOOD["weight"], counters)
    with pytest.raises(ValueError, match=r"counters are torch.int32 \[7\]"):
        skinny_gemm.skinny_gemm(GOOD["x"], GOOD["weight"], counters[:7])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps([name, CHECKS[name]()]), flush=True)
