"""Patches as a product, and GELU in a product's epilogue: what they compute, and what refuses the epilogue."""

import re
from typing import Any

import pytest
import torch
from helpers import noise_for, plain_config, tiny_observation, tiny_policy
from torch.nn import functional as F

from pi0exp import build, config
from pi0exp.fusion import vision
from pi0exp.kernels import patch_embed
from pi0exp.machine import Machine
from pi0exp.model.observation import scaled
from pi0exp.model.precision import FP32, FP32_TRUTH
from pi0exp.model.siglip import VisionMlp, plain_patches
from pi0exp.verify import FP32_LIMIT, rel_l2

H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")
MI300 = Machine(gpu="AMD Instinct MI300X", vendor="amd", arch="gfx942")


@pytest.mark.parametrize("bytes_", [True, False], ids=["bytes", "scaled"])
def test_patches_are_those_of_the_convolution(bytes_: bool):
    policy = tiny_policy(precision=FP32_TRUTH)
    tower = policy.model.vision
    size = policy.model.config.vision.image_size
    pictures = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = pictures if bytes_ else scaled(pictures)
    policy.begin("fusion")
    vision.patches_as_product(policy)
    torch.testing.assert_close(tower.embed_patches(tower, given), plain_patches(tower, given), rtol=1e-12, atol=1e-12)


def test_actions_are_the_same_with_patches_as_a_product():
    given, actions = tiny_observation([(1, 0, 1)], (3,)), []
    for precision in (FP32_TRUTH, FP32):
        policy = tiny_policy(precision=precision)
        if precision is FP32:
            policy.begin("fusion")
            vision.patches_as_product(policy)
        actions.append(policy.sample_actions(given, noise_for(policy, given)))
    assert max(rel_l2(actions[1], actions[0])) <= FP32_LIMIT


@pytest.mark.parametrize("bytes_", [True, False], ids=["bytes", "scaled"])
def test_patches_by_the_kernel_are_those_of_the_convolution(bytes_: bool, monkeypatch: pytest.MonkeyPatch):
    """Here its reference is in the kernel's place; scaled pictures never come to it."""
    asked = []

    def reference(image: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert image.is_contiguous()
        asked.append(len(image))
        return patch_embed.patch_embed_reference(image, *rest)

    monkeypatch.setattr(patch_embed, "patch_embed", reference)
    policy = tiny_policy(precision=FP32)
    tower = policy.model.vision
    size = policy.model.config.vision.image_size
    pictures = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = pictures[::2] if bytes_ else scaled(pictures[::2])
    policy.begin("fusion")
    vision.patches_by_kernel(policy)
    found = tower.embed_patches(tower, given)
    assert asked == ([2] if bytes_ else [])
    torch.testing.assert_close(found, plain_patches(tower, given), rtol=2e-6, atol=2e-6)
    assert found.is_contiguous()


def test_the_kernel_of_patches_stands_behind_the_product(monkeypatch: pytest.MonkeyPatch):
    """Applied after the rewrite, it takes the bytes and leaves the rest to it."""
    stack = config.stack(plain_config("fusion.patches=true", "fusion.rewrites.patch_product=true"))
    assert build.proofs(stack) == [("fusion", "patch_embed")]
    assert build.unmet(stack, H200) == build.unmet(stack, MI300) == []
    (reason,) = build.unmet(stack, Machine(gpu="CPU", vendor="cpu", arch=""))
    assert reason.endswith("(for patches)")
    policy = tiny_policy(precision=FP32)
    policy.begin("fusion")
    stack.fusion.apply(policy)
    slot = policy.model.vision.embed_patches
    assert slot.func is vision.patch_kernel
    assert slot.keywords["others"].func is vision.patch_product


CUBLASLT = "fusion: gelu_epilogue is cuBLASLt's: gemm.vision must be blas or cublaslt, with addmm_lt, or lt_tuned"
REFUSED = [
    ([], []),
    (["gemm=cublaslt"], []),
    (["gemm=triton", "gemm.vision=blas"], []),
    (["gemm=cublas"], [CUBLASLT]),
    (["gemm.addmm_lt=false"], [CUBLASLT]),
    (["gemm.vision=triton"], [CUBLASLT]),
    (["compile_mode.denoise=default"], []),
    (["compile_mode=default"], []),
    (["precision=fp8", "precision.keep=[vision]"], []),
    (
        ["precision=fp32"],
        ["fusion: gelu_epilogue is no float32: four times its error was measured; precision must not be fp32"],
    ),
    (
        ["precision=fp8"],
        ["fusion: gelu_epilogue has no fp8: precision=fp8 must keep vision in bf16 (precision.keep=[vision])"],
    ),
]


@pytest.mark.parametrize(("words", "reasons"), REFUSED, ids=lambda value: " ".join(value))
def test_what_the_epilogue_stands_beside(words: list[str], reasons: list[str]):
    assert build.unmet(config.stack(plain_config("fusion.gelu_epilogue=true", *words)), H200) == reasons


def test_the_epilogue_is_for_nvidia():
    stack = config.stack(plain_config("fusion.gelu_epilogue=true"))
    assert build.proofs(stack) == [("fusion", vision.PROOF)]
    assert re.search(vision.PROOF, "nvjet_sm90_tst_208x128_64x5_1x2_h_bz_coopA_gelubias_TNN")
    (reason,) = build.unmet(stack, MI300)
    assert reason.startswith("fusion: gelu_epilogue needs a GPU of nvidia")


def test_a_compiler_does_not_take_the_epilogue_apart():
    """In its graph the product with GELU is one operation; the values are those without a compiler."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(graph)
        return graph

    mlp = VisionMlp(config.model(plain_config("model=tiny"))[0].vision)
    x = torch.randn(2, 4, mlp.fc1.weight.shape[1])
    with torch.inference_mode():
        for parameter in mlp.parameters():
            parameter.normal_(std=0.3)
        compiled = torch.compile(vision.hidden, backend=backend, fullgraph=True)(mlp, x)
        torch.testing.assert_close(compiled, vision.hidden(mlp, x), rtol=0, atol=0)
    [graph] = seen
    assert [node.target for node in graph.graph.nodes if "gelu" in str(node.target)] == [
        torch.ops.pi0exp.product_with_gelu.default
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
def test_the_epilogue_is_one_launch_and_rounds_once():
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    mlp = VisionMlp(config.model(plain_config())[0].vision).to(device, dtype)
    x = torch.randn(3, 256, mlp.fc1.weight.shape[1], device=device, dtype=dtype)
    with torch.inference_mode():
        for parameter in mlp.fc1.parameters():
            parameter.normal_(std=0.03)
        truth = F.gelu(F.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double()), approximate="tanh")
        plain, fused = mlp(x), vision.hidden(mlp, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            vision.hidden(mlp, x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert fused.shape == plain.shape
    assert float((fused.double() - truth).norm()) <= float((plain.double() - truth).norm())
    assert [bool(re.search(vision.PROOF, name)) for name in kernels if "Memset" not in name] == [True]
