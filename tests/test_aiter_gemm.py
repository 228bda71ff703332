"""Products through a fake aiter: shapes with and without a row, shuffled weights, what they do not go with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aiter_fake import FakeAiter, install, row, table
from helpers import built, noise_for, subject_of, tiny_observation, tiny_policy, with_option

from pi0exp import aiter
from pi0exp.aiter import Gpu
from pi0exp.config import Stack
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gemm.aiter_gemm import SHIPPED, AiterGemm, matmul_by, shuffle
from pi0exp.model.layers import Linear
from pi0exp.model.precision import BF16
from pi0exp.policy import Policy
from pi0exp.result import Outcome, Result

BUILD = {"rocm": "7.2.0", "hipblaslt": "1100-abc"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeAiter:
    """aiter on an MI350X."""
    made = install(monkeypatch, tmp_path)
    monkeypatch.setattr(aiter, "_table", None)
    monkeypatch.setattr(aiter, "torch_gpu", lambda device: Gpu(made.gfx, made.compute_units))
    monkeypatch.setattr(aiter, "blas_versions", lambda: BUILD)
    return made


# ---- the option


def policy_with(option: AiterGemm) -> Policy:
    policy = tiny_policy(precision=BF16)
    policy.begin("gemm")
    option.apply(policy)
    return policy


@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
def test_policy_computes_the_same_actions(fake: FakeAiter, model: str):
    subject = subject_of(f"model={model}", "workload.num_steps=3")
    instance = built(with_option(subject, gemm=AiterGemm()))
    assert instance.verdict.wrong == []
    lines = instance.applied["gemm"]
    assert lines[0] == "amd-aiter unknown on gfx950 with 256 compute units; pi0_tuned.csv has 0 rows for it"
    assert any(
        line.startswith("denoise: ") and line.endswith(" Linear that are not of bf16 stay with BLAS") for line in lines
    )
    assert "denoise: 96 x 32: untuned (torch) for M " in "\n".join(lines)
    calls = fake.called("aiter.tuned_gemm.gemm_a16w16")
    assert calls
    assert fake.flagged == []
    shapes = {(c["A"].numel() // c["A"].shape[-1], *c["B"].shape, c["bias"] is not None) for c in calls}
    counters = instance.counters()
    assert sum(value for name, value in counters.items() if "/untuned" in name) >= len(shapes)
    assert sum(value for name, value in counters.items() if "/tuned" in name) == 0
    late = Result(Outcome.WRONG_NUMERICS, ["after it was timed: others"], metrics=counters)
    assert late.metrics == counters, "they are no times"


def test_rows_are_used_and_named(fake: FakeAiter, tmp_path: Path):
    """The expert's `up` and `gate` are 96 x 32 in the tiny model; 11 rows of 16 are padded."""
    path = table(tmp_path, row(M=16, N=96, K=32, libtype="triton", kernelName=""))
    policy = policy_with(AiterGemm(table=str(path)))
    assert fake.table == str(path), "set before aiter was imported"
    observation = tiny_observation()
    policy.sample_actions(observation, noise_for(policy, observation))
    assert "denoise: 96 x 32: triton for M 11" in policy.applied["gemm"]
    assert policy.counters()["aiter/tuned_shapes_denoise"] == 1
    assert policy.counters()["aiter/untuned_shapes_denoise"] > 1
    assert policy.attachments() == {"tuned.csv": path.read_text()}


def test_strict_wants_every_row(fake: FakeAiter):
    policy = policy_with(AiterGemm(strict=True))
    with pytest.raises(
        UnsupportedError, match=r"strict: the table has no row for M \d+, N 144, K 144 with bias on gfx950"
    ):
        policy.sample_actions(tiny_observation())


def test_aiter_that_answers_another_row_is_found(fake: FakeAiter, tmp_path: Path):
    """As where a row names a kernel that its FlyDSL does not know, which aiter passes over."""
    path = table(tmp_path, row(M=16, N=96, K=32, libtype="triton", kernelName=""))
    policy = policy_with(AiterGemm(table=str(path)))
    path.write_text(path.read_text().replace("gfx950", "gfx942"))
    with pytest.raises(UnsupportedError, match=r"has triton  for M 11.*line 2.*aiter answers torch"):
        policy.sample_actions(tiny_observation())


def test_bad_table_is_refused_before_any_call(fake: FakeAiter, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="304 compute units; this is gfx950 with 256"):
        policy_with(AiterGemm(table=str(table(tmp_path, row(gfx="gfx942", cu_num=304)))))
    assert not fake.called("aiter.tuned_gemm.gemm_a16w16")


def test_second_table_needs_a_second_process(fake: FakeAiter, tmp_path: Path):
    path = table(tmp_path)
    policy_with(AiterGemm(table=str(path)))
    policy_with(AiterGemm(table=str(path)))
    with pytest.raises(UnsupportedError, match=r"has imported aiter with .*tuned\.csv.*pi0_tuned\.csv needs a process"):
        policy_with(AiterGemm())


def test_aiter_imported_without_a_table(fake: FakeAiter):
    aiter.attention_module()
    with pytest.raises(UnsupportedError, match="has imported aiter with its own tables"):
        policy_with(AiterGemm())


def test_views_are_made_contiguous(fake: FakeAiter):
    gemm = aiter.gemm_module(SHIPPED)
    asked = []
    matmul = matmul_by(gemm.gemm_a16w16, lambda *shape: asked.append(shape) or True)
    x = torch.randn(4, 2, 32).bfloat16().transpose(0, 1)
    weight, bias = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
    assert torch.equal(matmul(x, weight, bias), F.linear(x.contiguous(), weight, bias))
    assert asked == [(8, 48, 32, True)]
    assert fake.flagged == []
    gemm.gemm_a16w16(weight, weight.reshape(32, 48).t().contiguous())
    with pytest.raises(RuntimeError, match="contiguous"):
        gemm.gemm_a16w16(x, weight)
    assert fake.flagged == ["activations that cannot be viewed as a matrix: aiter calls F.linear"]


def test_transposed_weight_is_found(fake: FakeAiter):
    gemm = aiter.gemm_module(SHIPPED)
    wrong = matmul_by(lambda x, weight, bias: gemm.gemm_a16w16(x, weight.t(), bias=bias), lambda *shape: True)
    with pytest.raises(RuntimeError, match=r"times \[32, 48\]"):
        wrong(torch.zeros(2, 32).bfloat16(), torch.zeros(48, 32).bfloat16(), None)


def test_shape_is_settled_when_it_is_traced(fake: FakeAiter):
    asked = []
    product = torch.library.custom_op("pi0exp_test::product", mutates_args=())(_product)
    product.register_fake(lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]))
    matmul = matmul_by(product, lambda *shape: asked.append(shape) or True)
    compiled = torch.compile(matmul, backend="eager", fullgraph=True, dynamic=False)
    x, weight = torch.randn(2, 3, 32), torch.randn(48, 32)
    for given in (x, x, x[:1]):
        torch.testing.assert_close(compiled(given, weight, None), F.linear(given, weight))
    assert asked == [(6, 48, 32, False), (3, 48, 32, False)]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


# ---- shuffled weights


def linear(out_width: int, in_width: int) -> Linear:
    return Linear(in_width, out_width, bias=False, dtype=torch.bfloat16)


def test_shuffled_weight_gives_the_same_product(fake: FakeAiter, tmp_path: Path):
    fake.gfx, fake.compute_units = "gfx942", 304
    gemm = aiter.gemm_module(SHIPPED)
    module, x = linear(48, 64), torch.randn(3, 64).bfloat16()
    plain = module(x)
    before = module.weight.detach().clone()
    shuffle(module, "expert.up")
    assert not torch.equal(module.weight, before)
    module.matmul = matmul_by(gemm.gemm_a16w16, lambda *shape: True)
    assert torch.equal(module(x), plain)
    del module.weight.is_shuffled
    assert not torch.allclose(module(x), plain, atol=0.1), "the mark is what tells aiter"


@pytest.mark.parametrize("shape", [(1152, 4304), (40, 64)])
def test_weight_that_cannot_be_shuffled(fake: FakeAiter, shape: tuple[int, int]):
    with pytest.raises(
        UnsupportedError, match=rf"vision\.fc2 is {shape[0]} x {shape[1]}; .* leave its stage to another"
    ):
        shuffle(linear(*shape), "vision.fc2")


def test_preshuffle_names_the_weight(fake: FakeAiter):
    with pytest.raises(UnsupportedError, match=r"preshuffle: vision\.\S+ is 144 x 144"):
        policy_with(AiterGemm(preshuffle=True))


def test_preshuffled_stage_computes_the_same(fake: FakeAiter):
    """The tiny expert's weights can all be shuffled; on gfx942 aiter has a kernel for each shape."""
    fake.gfx, fake.compute_units = "gfx942", 304
    subject = subject_of("model=tiny", "workload.num_steps=3")
    gemm = replace(subject.stack.gemm, denoise=AiterGemm(preshuffle=True))
    instance = built(with_option(subject, gemm=gemm))
    assert instance.verdict.wrong == []
    assert any("untuned (hipblaslt)" in line for line in instance.applied["gemm"])


def test_shape_without_a_shuffled_kernel(fake: FakeAiter):
    subject = subject_of("model=tiny", "workload.num_steps=3")
    policy = tiny_policy(precision=BF16)
    replace(subject.stack.gemm, denoise=AiterGemm(preshuffle=True)).apply(policy)
    with pytest.raises(UnsupportedError, match=r"no kernel for M 11, N \d+, K 32 without a row on gfx950"):
        policy.sample_actions(tiny_observation())


# ---- what it does not go with


def clashes(*words: str, **gemm: Any) -> list[str]:
    subject = subject_of("model=tiny", *words)
    stack: Stack = replace(subject.stack, gemm=AiterGemm(**gemm))
    return [reason for _, part in stack.gemm.parts() for reason in part.clashes(stack)]


def test_clashes():
    assert clashes() == []
    assert clashes("precision=fp32") == ["aiter's products here are of bf16; this precision has none"]
    assert clashes("compile_mode=default") == []
    (reason,) = clashes("compile_mode=default", preshuffle=True)
    assert reason.startswith("preshuffle=true needs compile_mode=none")
    assert clashes(denoise=AiterGemm(strict=True)) == []
    (first, second) = clashes(denoise=AiterGemm(table="other.csv"))
    assert first.startswith("aiter reads one table a process, not ")
    assert "other.csv" in second


def test_settings():
    assert subject_of("gemm=aiter").stack.gemm == AiterGemm()
    with pytest.raises(UserError, match=r"gemm\.table is 'a\.csv:b\.csv'; it must be one file"):
        subject_of("gemm=aiter", "gemm.table='a.csv:b.csv'")
    machine = SimpleNamespace(vendor="nvidia", gpu="NVIDIA H200", has_gpu=True, arch="sm_90")
    assert AiterGemm().unmet(machine)[0] == "needs a GPU of amd; this machine has NVIDIA H200"
    assert AiterGemm().proof() == ""
