"""precision=fp8: weights converted when the stack is applied, scales beside them, by stage; and what that costs.

Shapes: M rows, D input columns, E output rows of a weight.
"""

import pytest
import torch
from helpers import built, noise_for, plain_config, subject_of, tiny_observation, tiny_policy
from torch import nn

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.model.layers import Linear
from pi0exp.model.precision import BF16
from pi0exp.option import STAGES, Numerics
from pi0exp.policy import Policy
from pi0exp.precision.fp8 import LARGEST, Fp8, in_float8, quantized
from pi0exp.proof import unproven

H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
E4M3_ERROR = 2**-4
"""Three bits of mantissa: half of the distance between two numbers, relative to the smaller one."""


def applied(option: Fp8, pi05: bool = False) -> Policy:
    policy = tiny_policy(pi05, precision=BF16)
    policy.begin("precision")
    option.apply(policy)
    return policy


def dtypes(policy: Policy, stage: str) -> set[torch.dtype]:
    return {linear.weight.dtype for linear in policy.instances(Linear, stage)}


# ---- one product


def test_rows_keep_their_values_within_half_a_step():
    torch.manual_seed(0)
    values_MD = torch.randn(6, 64) * torch.tensor([1e-30, 1e-3, 1.0, 7.0, 1e4, 1e30])[:, None]
    narrow_MD, scale_M1 = quantized(values_MD)
    assert narrow_MD.dtype == torch.float8_e4m3fn
    assert torch.equal(narrow_MD.float().abs().amax(1), torch.full((6,), LARGEST))
    largest_M1 = values_MD.abs().amax(1, keepdim=True)
    # Below 2^-6 the numbers of e4m3 lie 2^-9 apart.
    error_MD = ((narrow_MD.float() * scale_M1) - values_MD).abs()
    assert (error_MD <= 1.001 * (E4M3_ERROR * values_MD.abs() + 2**-10 * largest_M1 / LARGEST)).all()
    assert error_MD.max() > 0


def test_row_of_zeros_stays_zero():
    narrow_MD, scale_M1 = quantized(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert (narrow_MD.float() * scale_M1 == 0).all()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_that_of_the_rounded_operands(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(1)
    linear = Linear(64, 48, bias=bias).to(torch.bfloat16).requires_grad_(False)
    before_ED = linear.weight.clone()
    linear.matmul = in_float8(linear)
    weight_ED = linear.weight.float() * linear.scale_E1
    assert linear.weight.dtype == torch.float8_e4m3fn
    assert tuple(linear.scale_E1.shape) == (48, 1)
    x = torch.randn(1, *shape).bfloat16() if len(shape) == 1 else torch.randn(shape).bfloat16()
    narrow, scale = quantized(x.flatten(0, -2))
    expected = (narrow.float() * scale) @ weight_ED.T + (linear.bias.float() if bias else 0)
    found = linear(x)
    assert found.shape == (*x.shape[:-1], 48)
    assert found.dtype == torch.bfloat16
    # One rounding to bf16 of the sum, and one of the product before the bias.
    error = (found.float().flatten(0, -2) - expected).norm() / expected.norm()
    assert error < 2 * 2**-8
    assert not torch.equal(before_ED.float(), weight_ED)


def test_size_that_libraries_cannot_take_is_named():
    with pytest.raises(ValueError, match=r"a weight of \[24, 64\]; both must be multiples of 16"):
        in_float8(Linear(64, 24, bias=False).to(torch.bfloat16))


# ---- the policy


@pytest.mark.parametrize("fusion", ["none", "projections"])
@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
def test_actions_stay_within_the_bound(model: str, fusion: str):
    subject = subject_of(f"model={model}", f"fusion={fusion}", "precision=fp8", "workload.num_steps=3")
    verdict = built(subject).verdict
    assert verdict.wrong == []
    assert subject.numerics is Numerics.APPROXIMATE
    assert build.bound(subject.stack) == Fp8.bound
    # Beside the bf16 policy, whose mantissas have four bits more in the weights and in the activations.
    assert 2 < verdict.metrics["error/ratio_mean"] < 2**4
    assert "error/rel_l2_plain_bf16" in verdict.metrics


def test_rewritten_weights_are_the_ones_converted():
    """Fusion comes first: a merged matrix has a scale for each of its rows."""
    words = ("fusion=projections", "fusion.rewrites.hoist_state=true", "fusion.rewrites.last_layer_kv=true")
    instance = built(subject_of("model=tiny", "precision=fp8", "workload.num_steps=1", *words))
    assert instance.verdict.wrong == []
    linears = instance.policy.instances(Linear, "prefill")
    merged = {linear.weight.shape[0] for linear in linears}
    assert instance.policy.model.paligemma.blocks[-1].kv.weight.shape[0] in merged
    for linear in linears:
        assert linear.weight.dtype == torch.float8_e4m3fn
        assert tuple(linear.scale_E1.shape) == (linear.weight.shape[0], 1)


@pytest.mark.parametrize("kept", [["prefill"], ["vision", "denoise"]])
def test_stages_that_are_kept_are_untouched(kept: list[str]):
    policy = applied(Fp8(keep=kept))
    for stage in STAGES:
        assert (torch.float8_e4m3fn in dtypes(policy, stage)) == (stage not in kept)
    # The projections around the expert stay in float32 under every policy.
    assert torch.float32 in dtypes(policy, "denoise")
    noted = [line.split(":")[0] for line in policy.applied["precision"] if "float8 weights" in line]
    assert noted == [stage for stage in STAGES if stage not in kept]


@pytest.mark.parametrize("kept", [True, False])
def test_ends_of_the_vision_tower(kept: bool):
    words = ("model.vision.depth=4", "precision=fp8", f"precision.keep_vision_ends={kept}")
    policy = subject_of("model=tiny", *words).policy(torch.device("cpu"))
    narrow = [
        {m.weight.dtype for m in block.modules() if isinstance(m, nn.Linear)} == {torch.float8_e4m3fn}
        for block in policy.model.vision.blocks
    ]
    assert narrow == [not kept, True, True, not kept]


def test_forgotten_scale_is_found():
    policy, plain = applied(Fp8()), tiny_policy(precision=BF16)
    given = tiny_observation()
    noise_BCA = noise_for(plain, given)
    truth_BCA = plain.sample_actions(given, noise_BCA)
    assert (policy.sample_actions(given, noise_BCA) - truth_BCA).norm() < Fp8.bound * truth_BCA.norm()
    for linear in policy.instances(Linear, "denoise"):
        if linear.weight.dtype == torch.float8_e4m3fn:
            linear.scale_E1.mul_(1.5)
    assert (policy.sample_actions(given, noise_BCA) - truth_BCA).norm() > Fp8.bound * truth_BCA.norm()


# ---- what it says of itself


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ("[visions]", "keep has 'visions'; it may hold vision, prefill, denoise"),
        (f"[{','.join(STAGES)}]", "all stages"),
    ],
)
def test_wrong_stages_are_told(keep: str, reason: str):
    with pytest.raises(UserError, match=reason):
        config.stack(plain_config("precision=fp8", f"precision.keep={keep}"))


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ([], []),
        (["gemm=triton"], STAGES),
        (["gemm=triton", "gemm.denoise=blas"], ["vision", "prefill"]),
        (["gemm.denoise=triton"], ["denoise"]),
        (["gemm.denoise=triton", "precision.keep=[denoise]"], []),
        (["gemm=tunable"], STAGES),
    ],
)
def test_other_products_clash(words: list[str], stages: list[str]):
    reasons = build.unmet(config.stack(plain_config("precision=fp8", *words)), H200)
    assert [reason.split(": ")[:2] for reason in reasons] == [["precision", stage] for stage in stages]


def test_needs_a_gpu_with_such_products():
    assert Fp8().unmet(H200) == []
    for machine in (Machine(), Machine(gpu="NVIDIA A100", vendor="nvidia", arch="sm_80")):
        assert Fp8().unmet(machine)


def test_proof_is_a_kernel_of_float8():
    proofs = [("precision", Fp8().proof())]
    assert unproven(proofs, ["nvjet_qqtst_128x160_128x6_2x1_v_bz_TNT"]) == []
    assert unproven(proofs, ["nvjet_sm90_qqtst_64x8_64x16_4x2_h_bz_TNT"]) == []
    assert unproven(proofs, ["void cutlass::device_kernel<at::cuda::(...)<cutlass::float_e4m3_t, ...>>"]) == []
    others = ["nvjet_sm90_tst_64x8_64x16_4x2_h_bz_TNT", "void at::native::copy_kernel<c10::Float8_e4m3fn>"]
    assert unproven(proofs, others)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("words", ["graphs=none", "stack=8_compiled"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_on_a_gpu(model: str, words: str):
    shallow = (f"model.{stack}.depth=3" for stack in ("vision", "paligemma", "expert"))
    made = subject_of(f"model={model}", *words.split(), *shallow, "model.vocab_size=4096", "precision=fp8")
    assert made.build(torch.device("cuda", 0), 8, lambda text: None).verdict.wrong == []
