"""Which aiter is installed, on which GPU, and what the fake one of the other tests stands for."""

import ast
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from aiter_fake import SIGNATURES, FakeAiter, install, signature_of, unshuffled
from helpers import CPU, tiny_policy

from pi0exp import aiter
from pi0exp.attention.aiter_attention import AiterAttention
from pi0exp.errors import UnsupportedError
from pi0exp.machine import Machine
from pi0exp.model.precision import BF16

MI350X = Machine(gpu="AMD Instinct MI350X", vendor="amd", arch="gfx950")
H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeAiter:
    return install(monkeypatch, tmp_path)


def has_versions(patch: pytest.MonkeyPatch, **versions: str) -> None:
    """Distributions that are installed, with - for _ in their names."""

    def version(name: str) -> str:
        if (key := name.replace("-", "_")) not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key]

    patch.setattr(importlib.metadata, "version", version)


# ---- which package it is


def test_on_other_gpus_the_gpu_comes_first(fake: FakeAiter):
    assert AiterAttention().unmet(H200) == ["needs a GPU of amd; this machine has NVIDIA H200"]
    assert AiterAttention().unmet(replace(MI350X, arch="gfx1201"))[0].startswith("needs the architecture gfx942 or")
    assert AiterAttention().unmet(MI350X) == []


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (reason,) = AiterAttention().unmet(MI350X)
    assert reason.startswith("needs AMD's aiter (amd-aiter), which is not installed")
    assert AiterAttention().unmet(H200)[0].startswith("needs a GPU of amd")


@pytest.mark.parametrize("imported", [False, True])
def test_package_of_the_same_name_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, imported: bool):
    """PyPI's `aiter` satisfies a requirement of aiter>=0.1.5."""
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if imported:
        module = ModuleType("aiter")
        module.__spec__ = importlib.util.find_spec("aiter")
        monkeypatch.setitem(sys.modules, "aiter", module)
    has_versions(monkeypatch, aiter="0.13.20191203")
    (reason,) = AiterAttention().unmet(MI350X)
    assert "the package that PyPI calls aiter (async iterators, version 0.13.20191203) is installed" in reason
    assert "https://github.com/ROCm/aiter" in reason


@pytest.mark.parametrize(
    ("version", "reasons"),
    [
        ("0.1.14", ["needs amd-aiter>=0.1.16; 0.1.14 is installed"]),
        ("0.1.16", []),
        ("0.1.20.post1", []),
        ("0.1.dev1+gde07f38", []),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, fake: FakeAiter, version: str, reasons: list[str]):
    has_versions(monkeypatch, amd_aiter=version)
    assert aiter.unmet_package() == reasons
    assert aiter.described() == f"amd-aiter {version}"


def test_nothing_is_imported_before_an_option_is_applied(fake: FakeAiter):
    AiterAttention().unmet(MI350X)
    assert not {name for name in sys.modules if name.partition(".")[0] == "aiter"}
    policy = tiny_policy(precision=BF16)
    AiterAttention().apply(policy)
    assert "aiter" in sys.modules


def test_gpu_is_what_both_see(monkeypatch: pytest.MonkeyPatch, fake: FakeAiter):
    facts = SimpleNamespace(gcnArchName="gfx950:sramecc+:xnack-", multi_processor_count=256)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert aiter.aiter_gpu(CPU) == aiter.Gpu("gfx950", 256)
    fake.compute_units = 304
    with pytest.raises(UnsupportedError, match=r"takes this GPU for gfx950 with 304 .* it is gfx950 with 256 .*CU_NUM"):
        aiter.aiter_gpu(CPU)


def test_blas_versions(monkeypatch: pytest.MonkeyPatch):
    pairs = (("PT_VERSION", "2.11.0"), ("ROCM_VERSION", "7.2.0.0"), ("HIPBLASLT_VERSION", "1100-abc"))
    monkeypatch.setattr(torch.cuda.tunable, "get_validators", lambda: pairs)
    assert aiter.blas_versions() == {"rocm": "7.2.0.0", "hipblaslt": "1100-abc"}
    monkeypatch.setattr(torch.cuda.tunable, "get_validators", lambda: pairs[:1])
    assert aiter.blas_versions() == {"rocm": "", "hipblaslt": ""}


# ---- the fake


def test_fake_refuses_what_aiter_refuses(fake: FakeAiter):
    import aiter as amd
    from aiter.ops.shuffle import shuffle_weight
    from aiter.tuned_gemm import gemm_a16w16

    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    weight = torch.zeros(48, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"aiter\.flash_attn_func: got an unexpected keyword argument 'scale'"):
        amd.flash_attn_func(q, q, q, scale=1.0)
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        amd.flash_attn_func(q=q, k=q)
    with pytest.raises(TypeError, match="too many positional arguments"):
        gemm_a16w16(q, weight, None, None, None, None, None, None)
    with pytest.raises(AttributeError, match=r"aiter v0\.1\.20\.post1 has no aiter\.flash_attn_with_kvcache"):
        _ = amd.flash_attn_with_kvcache
    with pytest.raises(ImportError, match="hipb_mm"):
        exec("from aiter.tuned_gemm import hipb_mm")  # it is at the top level
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        amd.flash_attn_func(q.float(), q.float(), q.float())
    with pytest.raises(RuntimeError, match="heads 4 of 8 on 3"):
        amd.flash_attn_func(q.transpose(1, 2), q[:, :3].transpose(1, 2), q[:, :3].transpose(1, 2))
    with pytest.raises(RuntimeError, match=r"\[2, 32\] times \[32, 48\]"):
        gemm_a16w16(weight[:2], weight.t())
    with pytest.raises(AssertionError, match="40 % 32"):
        shuffle_weight(torch.zeros(16, 40, dtype=torch.bfloat16))
    assert fake.flagged == []
    amd.flash_attn_func(q, q[:, :, :1].expand(1, 4, 2, 8), q[:, :, :1].expand(1, 4, 2, 8))
    assert fake.flagged == ["key/value heads were copied for the query heads"]


def test_shuffling_is_undone_by_the_fake(fake: FakeAiter):
    from aiter.ops.shuffle import shuffle_weight

    weight = torch.arange(32 * 64).reshape(32, 64).to(torch.int16)
    shuffled = shuffle_weight(weight, layout=(16, 16))
    assert shuffled.is_shuffled is True
    assert torch.equal(unshuffled(shuffled), weight)
    # The second group of eight columns follows when the 16 rows of the first are through.
    assert shuffled.flatten()[[0, 7, 8, 128]].tolist() == [weight[0, 0], weight[0, 7], weight[1, 0], weight[0, 8]]


def test_recorded_signatures_are_those_of_a_checkout():
    """Tag, recorded signatures and adapters change together; this compares the first two."""
    if not (root := os.environ.get("AITER_CHECKOUT")):
        pytest.skip("AITER_CHECKOUT names no checkout of aiter")
    for name, recorded in SIGNATURES.items():
        *_, owner, own = name.split(".")
        tree: Any = ast.parse(Path(root, recorded["file"]).read_text())
        scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)]
        found = [
            f"({ast.unparse(node.args).removeprefix('self, ')})"
            + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
            for scope in scopes
            for node in scope.body
            if isinstance(node, ast.FunctionDef) and node.name == own
        ]
        assert recorded["signature"] in found, name


def test_signatures_are_read_whole():
    signature = signature_of(SIGNATURES["aiter.flash_attn_func"]["signature"])
    assert list(signature.parameters)[:3] == ["q", "k", "v"]
    assert signature.parameters["window_size"].default == (-1, -1, 0)
    assert signature.bind(1, 2, 3).arguments == {"q": 1, "k": 2, "v": 3}
