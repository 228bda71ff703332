"""The choice of the BLAS library: what it sets, where it is refused, what shows it."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import built, plain_config, subject_of, tiny_policy

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.gemm import blas
from pi0exp.gemm.blas import PRODUCTS, Blas, Library, prefer
from pi0exp.gemm.hipblaslt import HipBlasLt
from pi0exp.machine import Machine, kept_environment, missing_environment, set_environment
from pi0exp.option import Numerics
from pi0exp.policy import Policy

NVIDIA = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")
AMD = Machine(gpu="AMD Instinct MI300X", vendor="amd", arch="gfx942")
OFF_LT = {"DISABLE_ADDMM_CUDA_LT": "1"}
Backend = torch._C._BlasBackend
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


def lacking(machine: Machine, *words: str) -> list[str]:
    return build.unmet(config.stack(plain_config(*words)), machine)


class Choice:
    """torch.backends.cuda.preferred_blas_library of a GPU that has these libraries."""

    def __init__(self, has: set[Any]) -> None:
        self.has, self.now, self.asked = has, Backend.Default, []

    def __call__(self, name: str | None = None) -> Any:
        if name is not None:
            self.asked.append(name)
            wanted = {"cublas": Backend.Cublas, "cublaslt": Backend.Cublaslt}[name]
            self.now = wanted if wanted in self.has else Backend.Cublas
        return self.now


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Choice:
    choice = Choice({Backend.Cublas, Backend.Cublaslt})
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", choice)
    return choice


def applied(option: Blas | HipBlasLt) -> Policy:
    policy = tiny_policy()
    policy.begin("gemm")
    option.apply(policy)
    return policy


@pytest.mark.parametrize(
    ("library", "asked"),
    [
        (Library.cublas, "cublas"),
        (Library.cublaslt, "cublaslt"),
        (Library.rocblas, "cublas"),
        (Library.hipblaslt, "cublaslt"),
    ],
)
def test_library_is_set_once_and_said(choice: Choice, library: Library, asked: str):
    policy = applied(Blas(library=library))
    assert choice.asked == [asked]
    assert policy.applied["gemm"] == [f"all products of the process prefer {library}"]


def test_short_form_is_the_long_form(choice: Choice):
    assert applied(HipBlasLt()).applied == applied(Blas(library=Library.hipblaslt)).applied
    assert choice.asked == ["cublaslt"] * 2


def test_auto_leaves_everything_as_it_is(choice: Choice):
    policy = applied(Blas())
    assert choice.asked == []
    assert policy.applied == {}
    assert Blas().numerics is Numerics.EXACT
    assert Blas(addmm_lt=False).numerics is Numerics.EXACT
    assert Blas(library=Library.cublas).numerics is Numerics.REORDERED


def test_library_that_pytorch_does_not_take_is_an_error(choice: Choice):
    choice.has.remove(Backend.Cublaslt)
    with pytest.raises(RuntimeError, match="PyTorch did not take library=hipblaslt on this GPU"):
        prefer(Library.hipblaslt)


@pytest.mark.parametrize(
    ("machine", "words", "reason"),
    [
        (NVIDIA, ["gemm.library=rocblas"], "gemm: library=rocblas needs a GPU of amd; this machine has NVIDIA H200"),
        (NVIDIA, ["gemm.library=hipblaslt"], "gemm: library=hipblaslt needs a GPU of amd"),
        (NVIDIA, ["gemm=hipblaslt"], "gemm: needs a GPU of amd"),
        (AMD, ["gemm.library=cublas"], "gemm: library=cublas needs a GPU of nvidia; this machine has AMD Instinct"),
        (AMD, ["gemm.library=cublaslt"], "gemm: library=cublaslt needs a GPU of nvidia"),
        (Machine(), ["gemm.library=cublas"], "gemm: library=cublas needs a GPU of nvidia; this machine has no GPU"),
        (Machine(), ["gemm.addmm_lt=false"], "gemm: addmm_lt=false needs a GPU of nvidia or amd"),
        (NVIDIA, ["gemm.denoise={name: blas, library: cublas}"], "gemm.denoise: library=cublas holds for the whole"),
        (NVIDIA, ["gemm.denoise={name: blas, addmm_lt: false}"], "gemm.denoise: addmm_lt=false holds for the whole"),
        (NVIDIA, ["gemm.library=cublas", "gemm.denoise=blas"], "gemm: library=cublas holds for the whole process: den"),
        (AMD, ["gemm.prefill=hipblaslt"], "gemm.prefill: hipblaslt holds for the whole process, not for one stage"),
        (AMD, ["gemm=hipblaslt", "gemm.prefill=blas"], "gemm: hipblaslt holds for the whole process: prefill cannot"),
    ],
)
def test_where_it_is_refused(machine: Machine, words: list[str], reason: str):
    (found,) = lacking(machine, *words)
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (NVIDIA, ["gemm.library=cublaslt", "gemm.addmm_lt=false"]),
        (AMD, ["gemm.library=rocblas"]),
        (AMD, ["gemm=hipblaslt"]),
        (NVIDIA, ["gemm.denoise=blas"]),
        (Machine(), []),
    ],
)
def test_where_it_is_not(machine: Machine, words: list[str]):
    assert lacking(machine, *words) == []


def test_unknown_library_is_told_in_one_line():
    with pytest.raises(UserError, match=r"gemm\.library: Invalid value 'mkl'") as caught:
        config.stack(plain_config("gemm.library=mkl"))
    assert "\n" not in str(caught.value)


# ---- the Lt interface


def test_lt_can_be_kept_off_by_the_environment_only():
    option = Blas(addmm_lt=False)
    assert option.environment() == OFF_LT
    assert Blas().environment() == {}
    with kept_environment():
        set_environment({"DISABLE_ADDMM_CUDA_LT": "0"})
        assert missing_environment(option.environment()) == ["DISABLE_ADDMM_CUDA_LT=1"]
        with pytest.raises(UserError, match=r"gemm\.addmm_lt=false: start Python with DISABLE_ADDMM_CUDA_LT=1"):
            applied(option)
        set_environment(option.environment())
        assert missing_environment(option.environment()) == []
        assert applied(option).applied["gemm"] == [
            "products with a bias keep off the Lt interface (DISABLE_ADDMM_CUDA_LT=1)"
        ]


def test_lt_that_is_on_does_not_ask_the_environment():
    with kept_environment():
        set_environment(OFF_LT)
        assert missing_environment(Blas().environment()) == []


# ---- proof


@pytest.mark.parametrize(
    ("vendor", "kernel"),
    [
        ("nvidia", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT"),
        ("nvidia", "cutlass_80_tensorop_s1688gemm_128x128"),
        ("nvidia", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64"),
        ("nvidia", "void gemmSN_TN_kernel<float, 128>"),
        ("nvidia", "void cublasLt::splitKreduce_kernel<32, 16>"),
        ("amd", "Cijk_Alik_Bljk_BBS_BH_Bias_MT16x16x256"),
        ("amd", "Custom_Cijk_Alik_Bljk_BBS_BH_SK3"),
    ],
)
def test_proof_finds_the_vendors_kernels(vendor: str, kernel: str):
    assert re.search(PRODUCTS[vendor], kernel)
    other = "amd" if vendor == "nvidia" else "nvidia"
    assert not re.search(PRODUCTS[other], kernel)


@pytest.mark.parametrize("kernel", ["triton_poi_fused_add_0", "void at::native::elementwise_kernel<128>", "flash_fwd"])
def test_proof_finds_nothing_else(kernel: str):
    assert not any(re.search(pattern, kernel) for pattern in PRODUCTS.values())


def test_named_libraries_are_proven():
    assert Blas().proofs() == []
    assert Blas(library=Library.cublas).proofs() == [PRODUCTS["nvidia"]]
    assert Blas(library=Library.rocblas).proofs() == HipBlasLt().proofs() == [PRODUCTS["amd"]]
    assert set(blas._VENDORS) == set(blas._TORCH_NAMES) == set(Library) - {Library.auto}


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("library", ["cublas", "cublaslt"])
def test_library_on_a_gpu(library: str):
    shallow = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
    made = subject_of(*shallow, f"gemm.library={library}")
    before = torch.backends.cuda.preferred_blas_library()
    try:
        instance = made.build(torch.device("cuda", 0), 8, lambda text: None)
        assert torch.backends.cuda.preferred_blas_library() == getattr(Backend, library.capitalize())
    finally:
        torch.backends.cuda.preferred_blas_library(before)
    assert instance.verdict.wrong == []


def test_stack_speaks_for_the_library():
    """Numerics and proof of an option that differ with its settings reach the stack."""
    stack = config.stack(plain_config("gemm.library=cublas"))
    assert build.numerics(stack) is Numerics.REORDERED
    assert ("gemm", PRODUCTS["nvidia"]) in build.proofs(stack)
    assert build.numerics(replace(stack, gemm=Blas())) is Numerics.EXACT


def test_default_says_nothing_and_is_exact():
    instance = built(subject_of("model=tiny", "workload.num_steps=1"))
    assert set(instance.applied) == {"precision"}
    assert instance.verdict.wrong == []
