"""gemm=stream_k: actions of the tiny models with its kernel run as Python, and what it refuses."""

from types import SimpleNamespace

import gluon_fake
import pytest
import torch
from helpers import noise_for, plain_config, tiny_observation, tiny_policy

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.gemm.stream_k import StreamKGemm
from pi0exp.kernels import gemm_epilogue, ring, stream_k_gemm
from pi0exp.machine import Machine
from pi0exp.model.precision import BF16, FP32_TRUTH
from pi0exp.verify import SINGLE_RATIO, rel_l2

H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A GPU of four multiprocessors; shapes of the products that its kernel multiplied."""
    seen: list[tuple[int, ...]] = []

    def described(tensor: torch.Tensor, block: list[int], layout: object) -> SimpleNamespace:
        seen.append(tuple(tensor.shape))
        return SimpleNamespace(base=tensor)

    gpu = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(stream_k_gemm, "TensorDescriptor", SimpleNamespace(from_tensor=described))
    return seen


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("stages", [("vision",), ("vision", "prefill", "denoise")], ids=" ".join)
def test_actions_are_the_same(stages: tuple[str, ...], activation: bool, four: list[tuple[int, ...]]):
    given = tiny_observation([(1, 0, 1)], (3,))
    truth, plain, policy = (tiny_policy(precision=one, num_steps=1) for one in (FP32_TRUTH, BF16, BF16))
    policy.begin("gemm")
    StreamKGemm(activation=activation, min_rows=8).apply_to(policy, stages)
    noise_BCA = noise_for(policy, given)
    exact, own = (one.sample_actions(given, noise_BCA) for one in (truth, plain))
    with gluon_fake.interpreted(gemm_epilogue, ring, stream_k_gemm):
        found = policy.sample_actions(given, noise_BCA)
    assert max(rel_l2(found, exact)) <= SINGLE_RATIO * max(rel_l2(own, exact))
    products = len(four) // 2
    # Of each picture and block: queries, keys, values, out, two of the MLP; and the projector.
    of_vision = len(given.images) * (6 * policy.model.config.vision.depth + 1)
    assert products == of_vision if stages == ("vision",) else products > of_vision
    assert f"vision: {policy.model.config.vision.depth} VisionMlp.hidden" in str(policy.applied) or not activation


def test_few_rows_stay_with_blas(four: list[tuple[int, ...]]):
    given, policy = tiny_observation(), tiny_policy(precision=BF16, num_steps=1)
    expected = policy.sample_actions(given, noise_for(policy, given))
    policy.begin("gemm")
    StreamKGemm(min_rows=100_000).apply_to(policy, ("vision", "prefill", "denoise"))
    assert torch.equal(policy.sample_actions(given, noise_for(policy, given)), expected)
    assert four == []


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["gemm=stream_k"], []),
        (["gemm.vision=stream_k", "graphs=manual", "attention=triton", "fusion=kernels"], []),
        (["gemm.vision=stream_k", "fusion=hopper"],
         ["fusion: gelu_epilogue is cuBLASLt's: gemm.vision must be blas or cublaslt, with addmm_lt"]),
        (["gemm.vision=stream_k", "fusion=blocks"], []),
        (["gemm.vision=stream_k", "precision=fp32"],
         ["gemm.vision: stream_k has no products of float32, and this precision has no others"]),
        (["gemm.vision=stream_k", "precision=fp8", "precision.keep=[vision]"], []),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_what_it_stands_beside(words: list[str], reasons: list[str]):
    found = build.unmet(config.stack(plain_config(*words)), H200)
    assert [reason for reason in found if reason.split(":")[0] in ("gemm", "gemm.vision", "fusion")] == reasons


def test_rows_must_be_some():
    with pytest.raises(UserError, match="min_rows is 0; it must be 1 or more"):
        config.stack(plain_config("gemm=stream_k", "gemm.min_rows=0"))
