"""Dependent launches: when they are, what is compiled for them, and on a GPU that none reads too early."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pi0exp.kernels import adarms_norm, attention_launch, attention_split, dependent, gated_activation, layer_norm
from pi0exp.kernels import rms_norm as rms
from pi0exp.kernels import rope_qkv as rope
from pi0exp.kernels.attention_dense import attend_dense
from pi0exp.kernels.gemm_epilogue import arch_of
from pi0exp.kernels.kernel import AheadOfTime

BETWEEN_PRODUCTS = (adarms_norm, attention_launch, attention_split, gated_activation, layer_norm, rms, rope)
"""The files whose launches ask `dependent`."""


def test_only_sm_90_has_them(monkeypatch: pytest.MonkeyPatch):
    x = torch.zeros(2)
    assert not dependent.dependent(x)
    monkeypatch.setattr(dependent, "arch_of", lambda device: "sm_90")
    assert dependent.dependent(x)
    assert not dependent.dependent(x, False)
    assert not dependent.dependent(torch.nn.Parameter(x))  # as a tracer's, no plain tensor


@pytest.mark.parametrize("pdl", [False, True])
def test_kernel_and_launch_are_told_the_same(pdl: bool):
    told = dependent.launch_behind(pdl)
    assert told["PDL"] is pdl
    assert told.get("launch_pdl", False) is pdl


def test_both_launches_are_compiled():
    entry = AheadOfTime("prefill", rms.rms_norm_kernel, {"x_ptr": "*bf16"}, {"D": 8})
    ordinary, behind = dependent.also_dependent(entry)
    assert (ordinary.name, ordinary.targets) == ("prefill", ("gfx942", "gfx950", "sm_90"))
    assert (behind.name, behind.targets) == ("prefill, dependent", ("sm_90",))
    assert ordinary.constants == {"D": 8, "PDL": False}
    assert behind.constants == {"D": 8, "PDL": True}


def layers_between_products(x_BTD: Tensor) -> Tensor:
    """Forty short kernels, each of which reads what the one in front writes."""
    B, T, D = x_BTD.shape
    weight_D = torch.linspace(-0.5, 0.5, D, device=x_BTD.device)
    shift_B1D = weight_D.expand(B, 1, D)
    turn_BT1H = torch.ones(1, T, 1, D // 8, device=x_BTD.device)
    for _ in range(5):
        branch_BTD = rms.rms_norm(x_BTD, weight_D, 1e-6)
        x_BTD, normed_BTD = rms.add_rms_norm(x_BTD, branch_BTD, weight_D, 1e-6)
        heads_BTNH = normed_BTD.unflatten(-1, (8, D // 8))
        q_BTNH, k_BTKH, v_BTKH = rope.rope_qkv(heads_BTNH, heads_BTNH, heads_BTNH, turn_BT1H, turn_BT1H)
        mixed_BTD = attend_dense(q_BTNH, k_BTKH, v_BTKH, None, False, 0.1).flatten(2)
        split_BTD = attention_split.attend_split(q_BTNH, k_BTKH, v_BTKH, None, False, 0.1).flatten(2)
        gated_BTD = gated_activation.gated_activation(mixed_BTD, split_BTD, "gelu_tanh")
        x_BTD = adarms_norm.adarms_norm(gated_BTD + x_BTD, shift_B1D, shift_B1D, 1e-6)
        x_BTD = layer_norm.layer_norm(x_BTD, weight_D, weight_D, 1e-6)
    return x_BTD


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
@pytest.mark.parametrize("rows", [10, 50, 788])
def test_none_reads_too_early(rows: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator("cuda").manual_seed(rows)
    x_BTD = torch.randn(1, rows, 1024, generator=generator, device="cuda").bfloat16()
    answers: list[bool] = []

    def counted(ask: Callable[..., bool]) -> Callable[..., bool]:
        def answer(*given: object) -> bool:
            answers.append(ask(*given))
            return answers[-1]

        return answer

    for module in BETWEEN_PRODUCTS:
        monkeypatch.setattr(module, "dependent", counted(dependent.dependent))
    found = layers_between_products(x_BTD)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layers_between_products(x_BTD)
    assert set(answers) == {arch_of(x_BTD.device) == "sm_90"}
    for module in BETWEEN_PRODUCTS:
        monkeypatch.setattr(module, "dependent", lambda *given: False)
    one_by_one = layers_between_products(x_BTD)
    assert one_by_one.isfinite().all()
    assert torch.equal(found, one_by_one)
    for _ in range(200):
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, one_by_one)
