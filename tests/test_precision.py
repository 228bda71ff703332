"""The group `precision` can hold narrow weights: converted when the stack is applied, scales beside them, by stage.

Shown by a toy in float8, which a CPU can store and convert but not multiply.

Shapes: E output rows, D input columns.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import built, noise_for, subject_of, tiny_observation, tiny_policy, with_option
from torch import Tensor, nn

from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.model.precision import BF16, BF16_TRUTH
from pi0exp.option import STAGES, Numerics
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Float8(PrecisionOption):
    """Weights as float8 with one float32 scale an output row, in all stages that are not kept."""

    numerics = Numerics.APPROXIMATE
    bound = 1.0
    model = BF16
    truth = BF16_TRUTH

    keep_vision: bool = False
    keep_prefill: bool = False
    keep_denoise: bool = False

    def apply(self, policy: Policy) -> None:
        super().apply(policy)
        stages = tuple(stage for stage in STAGES if not getattr(self, f"keep_{stage}"))
        policy.fill_each(Linear, "matmul", narrowed, stages, "float8 weights")


def narrowed(linear: Linear) -> MatmulFn | None:
    """Convert the weight in place; None, and nothing done, where the policy holds it in float32."""
    if linear.weight.dtype == torch.float32:
        return None
    scale_E1 = linear.weight.float().abs().amax(dim=1, keepdim=True) / LARGEST
    linear.register_buffer("scale_E1", scale_E1)
    linear.weight = nn.Parameter((linear.weight.float() / scale_E1).to(torch.float8_e4m3fn), requires_grad=False)

    def matmul(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        return F.linear(x, (weight_ED.float() * scale_E1).to(x.dtype), bias_E)

    return matmul


@pytest.mark.parametrize("fusion", ["none", "projections"])
@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
def test_narrow_weights_verify_within_their_bound(model: str, fusion: str):
    subject = with_option(subject_of(f"model={model}", f"fusion={fusion}", "workload.num_steps=3"), precision=Float8())
    instance = built(subject)
    assert instance.verdict.wrong == []
    assert subject.numerics is Numerics.APPROXIMATE
    # Three bits of mantissa: between one and two orders above bf16's error, and far below another function's.
    assert 3 < instance.verdict.metrics["error/ratio_mean"] < 100


def test_merged_matrices_are_the_ones_converted():
    """Fusion comes first: a merged matrix has one row of scales for each of its rows."""
    instance = built(
        with_option(subject_of("model=tiny", "fusion=projections", "workload.num_steps=1"), precision=Float8())
    )
    for attention in (block.attention for block in instance.policy.model.paligemma.blocks):
        assert attention.qkv.weight.dtype == torch.float8_e4m3fn
        assert tuple(attention.qkv.scale_E1.shape) == (attention.qkv.weight.shape[0], 1)


def test_stage_that_is_kept_is_untouched():
    policy = tiny_policy(precision=BF16)
    policy.begin("precision")
    Float8(keep_prefill=True).apply(policy)
    kinds = {stage: {m.weight.dtype for m in policy.instances(Linear, stage)} for stage in STAGES}
    assert kinds["prefill"] == {torch.bfloat16}
    assert kinds["vision"] == {torch.float8_e4m3fn}
    # The projections around the expert stay in float32 under every policy.
    assert kinds["denoise"] == {torch.float8_e4m3fn, torch.float32}
    assert [line.split(":")[0] for line in policy.applied["precision"][1:]] == ["vision", "denoise"]


def test_forgotten_scale_is_found():
    policy, plain = tiny_policy(precision=BF16), tiny_policy(precision=BF16)
    policy.begin("precision")
    Float8().apply(policy)
    given = tiny_observation()
    noise_BCA = noise_for(plain, given)
    right = (policy.sample_actions(given, noise_BCA) - plain.sample_actions(given, noise_BCA)).norm()
    for linear in policy.instances(Linear, "denoise"):
        if linear.weight.dtype == torch.float8_e4m3fn:
            linear.scale_E1.mul_(1.5)
    wrong = (policy.sample_actions(given, noise_BCA) - plain.sample_actions(given, noise_BCA)).norm()
    assert wrong > 3 * right
