"""The policy's matrix products as a subject: which they are, how they are verified, what their times come to."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, plain_config

from pi0exp import config, measure, subject
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.model.layers import Linear
from pi0exp.option import STAGES, Numerics, Option
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicySubject
from pi0exp.result import Outcome
from pi0exp.roofline import Ceilings
from pi0exp.subjects.product_set import set_count
from pi0exp.subjects.product_times import rates, repeats, rounds, totals
from pi0exp.subjects.products import ProductsInstance, ProductsSubject
from pi0exp.subjects.shapes import Product

METRIC = re.compile(r"[\w./: -]+")
"""What MLflow takes as the name of a metric."""
FEW = ("model=tiny", "workload.num_steps=2")


def products_of(*words: str) -> ProductsSubject:
    made = subject.subject(plain_config("subject=products", *FEW, *words))
    assert isinstance(made, ProductsSubject)
    return made


def built(made: ProductsSubject, **options: Option) -> ProductsInstance:
    whole = replace(made.whole, stack=replace(made.whole.stack, **options))
    return replace(made, whole=whole).build(CPU, 2, lambda text: None)


def observed(whole: PolicySubject) -> list[tuple[str, int, int, int, bool, str]]:
    """The same by hooks on a policy that really runs: stage, rows, out, inner, bias, name of the weight."""
    policy, found = whole.policy(CPU), []
    names = {module: name for name, module in policy.model.named_modules()}

    def hook(stage):
        def seen(module, args, result):
            bias = module.bias is not None
            rows = args[0].numel() // module.in_features
            found.append((stage, rows, module.out_features, module.in_features, bias, names[module]))

        return seen

    for stage in STAGES:
        for linear in policy.instances(Linear, stage):
            linear.register_forward_hook(hook(stage))
    [given] = whole.on_device(whole.inputs(1).items, CPU)
    policy.sample_actions(*given)
    return found


@pytest.mark.parametrize(
    "words",
    [
        "model=tiny_pi05",
        "workload.horizon=7",
        "image_masking=skip",
        "fusion=projections",
        "precision=fp32",
    ],
)
def test_a_policy_is_asked_once_and_another_one_anew(words: str):
    """The gemm alone decides nothing; each of the words does."""
    first = products_of("workload=masked").calls
    assert products_of("workload=masked", "gemm=cublaslt").calls is first
    assert products_of("workload=masked", words).calls != first


@pytest.mark.parametrize(
    "words",
    [
        "",
        "workload=masked image_masking=skip fusion=projections",
        "fusion=projections fusion.rewrites.batch_cameras=true fusion.rewrites.last_layer_kv=true"
        " fusion.rewrites.hoist_time=true fusion.rewrites.hoist_state=true",
        "model=tiny_pi05 workload.batch_size=2",
    ],
)
def test_products_are_those_that_the_policy_computes(words: str):
    made = products_of(*words.split())
    seen = observed(made.whole)
    assert len(made.calls) == len(seen)
    weights: dict[tuple[object, ...], dict[str, int]] = {}
    for (product, which), (*shape, name) in zip(made.calls, seen, strict=True):
        assert (product.stage, product.rows, product.out, product.inner, product.bias) == tuple(shape)
        known = weights.setdefault((*shape, product.dtype), {})
        assert which == known.setdefault(name, len(known))


def test_names_are_those_of_metrics_and_tell_products_apart():
    made = products_of()
    names = {product: product.name for product, _ in made.calls}
    assert len(set(names.values())) == len(names)
    assert all(METRIC.fullmatch(name) for name in names.values())
    assert "prefill/68x128x48" in names.values()
    assert "denoise/10x32x32_bias_fp32" in names.values()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("attention=sdpa", "attention=sdpa has no effect with subject=products"),
        ("compile_mode=default", "compile_mode=default has no effect with subject=products"),
        ("fusion.norms=true", "fusion.norms changes no matrix product"),
        ("gemm=triton gemm.residual=true", "gemm: activation and residual do more than multiply"),
        ("subject.replay_us=0", "subject.replay_us is 0.0; it must be above 0"),
    ],
)
def test_what_would_do_nothing_is_refused(words: str, cause: str):
    with pytest.raises(UserError) as told:
        products_of(*words.split())
    assert str(told.value).startswith(cause)


def test_each_library_runs_where_it_is():
    h200 = Machine("NVIDIA H200", "nvidia", "sm_90", 143771)
    for gemm in ("blas", "cublas", "cublaslt", "tunable", "triton"):
        assert products_of(f"gemm={gemm}").unmet(h200) == [], gemm
        assert (products_of(f"gemm={gemm}").unmet(Machine()) == []) == (gemm == "blas")
    assert "needs a GPU of amd" in products_of("gemm=hipblaslt").unmet(h200)[0]
    assert products_of("precision=fp8").unmet(h200) == []
    assert "multiplies bf16 weights" in products_of("precision=fp8", "gemm=triton").unmet(h200)[0]


# ---- verified


@pytest.mark.parametrize("words", ["", "precision=fp32", "precision=fp8 fusion=projections", "gemm.denoise=blas"])
def test_right_products_are_found_right(words: str):
    instance = built(products_of(*words.split()))
    assert instance.verdict.wrong == []
    assert instance.verdict.metrics["error/rel_l2"] > 0
    instance.call(0)
    instance.call_host(0)
    assert instance.recheck() == []


@dataclass(frozen=True)
class Off(Option):
    """A product that is off by one part in a hundred."""

    numerics = Numerics.REORDERED

    def apply(self, policy: Policy) -> None:
        policy.fill(Linear, "matmul", lambda x, w, b: 1.01 * F.linear(x, w, b), ("denoise",), "a little more")


@dataclass(frozen=True)
class OffExact(Off):
    numerics = Numerics.EXACT


@dataclass(frozen=True)
class Bounded(Off):
    numerics = Numerics.APPROXIMATE
    bound = 0.007


@pytest.mark.parametrize(("option", "cause"), [(Off(), "L2 error"), (OffExact(), "EXACT"), (Bounded(), "bound 0.007")])
def test_wrong_products_are_found(option: Option, cause: str):
    wrong = built(products_of(), gemm=option).verdict.wrong
    assert wrong
    assert cause in wrong[0]
    assert all("denoise" in text or text.startswith("gemm declared EXACT") for text in wrong)


# ---- times


BIG = Product("prefill", 788, 32768, 2048, False, torch.bfloat16)
FEW_ROWS = Product("denoise", 11, 1024, 4096, False, torch.bfloat16)
CEILINGS = Ceilings(bytes_per_s=4e12, flops_per_s=8e14)


def test_weights_do_not_fit_the_cache():
    cache = 50 * 2**20
    for product in (BIG, FEW_ROWS):
        assert set_count(product, 1, cache) * product.bytes_moved > 3 * cache
    assert set_count(FEW_ROWS, 25, cache) == 25
    assert set_count(FEW_ROWS, 18, 0) == 18
    tiny = Product("denoise", 10, 32, 1024, True, torch.float32)
    assert set_count(tiny, 1, cache) == 256


def test_totals_weigh_each_shape_by_its_calls():
    times, calls = {BIG: 200.0, FEW_ROWS: 5.0}, {BIG: 18, FEW_ROWS: 180}
    made = totals(calls, times, CEILINGS)
    assert made["cases/ms"] == pytest.approx(4.5)
    assert made["cases/tflop_per_s"] == pytest.approx((18 * BIG.flops + 180 * FEW_ROWS.flops) / 4.5e-3 / 1e12)
    least_big, least_few = BIG.flops / 8e14 * 1e6, FEW_ROWS.bytes_moved / 4e12 * 1e6
    assert made["cases/share"] == pytest.approx((18 * least_big + 180 * least_few) / 4500)
    assert made["cases/matrix_share"] == pytest.approx(least_big / 200)
    assert made["cases/matrix_ms"] == pytest.approx(3.6)
    assert "cases/matrix_share" not in totals({FEW_ROWS: 1}, times, CEILINGS)
    assert set(totals(calls, times, None)) == {"cases/ms", "cases/tflop_per_s"}


def test_rates_of_a_shape():
    made = rates(BIG, 200.0, CEILINGS)
    assert made["case_us/prefill/788x32768x2048"] == 200
    assert made["case_tflop_per_s/prefill/788x32768x2048"] == pytest.approx(BIG.flops / 2e-4 / 1e12)
    assert made["case_share/prefill/788x32768x2048"] == pytest.approx(BIG.flops / 8e14 / 2e-4)


def test_samples_follow_the_measure():
    assert rounds(config.MeasureConfig()) == 20
    assert rounds(config.MeasureConfig(samples=30)) == 7
    assert repeats(BIG, 18, None, 1000.0) == 18
    assert repeats(BIG, 18, CEILINGS, 1000.0) % 18 == 0


def test_result_holds_every_shape():
    """The whole child in this process: build, verify, time, details, verify again."""
    plain = plain_config("subject=products", *FEW, "measure=quick", "measure.samples=2", "measure.warmup_calls=1",
                         "measure.warmup_s=0", "measure.warmup_max_s=0", "measure.device=cpu")  # fmt: skip
    made = measure.measure(plain)
    assert made.outcome is Outcome.OK, made.reasons
    shapes = {product.name for product, _ in products_of().calls}
    assert {name for name in made.samples if name.startswith("case_us/")} == {f"case_us/{name}" for name in shapes}
    assert all(len(made.samples[f"case_us/{name}"]) == 7 for name in shapes)
    assert made.metrics["cases/ms"] > 0
    assert {"stage_ms/vision", "stage_ms/prefill", "stage_ms/denoise"} <= set(made.metrics)
    assert all(METRIC.fullmatch(name) for name in made.metrics)
    assert made.facts["caches"].startswith("unknown")
