"""Subjects beside the policy on a GPU, each through the whole child: built, verified, timed, proven, broken down."""

import pytest
import torch
from helpers import plain_config

from pi0exp import measure
from pi0exp.result import Outcome, Result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")


def measured(*words: str) -> Result:
    made = measure.measure(plain_config("measure=quick", *words))
    assert made.outcome is Outcome.OK, made.reasons
    return made


@pytest.mark.parametrize("words", ["", "fusion=kernels", "attention=sdpa attention.backend=flash", "graphs=manual"])
def test_layers(words: str):
    made = measured("subject=layers", *words.split())
    assert made.metrics["stage_ms/prefill"] == pytest.approx(made.metrics["latency_ms/p50"], rel=0.2)
    assert 0.05 < made.metrics["roofline/share"] < 1


@pytest.mark.parametrize("kind", ["elementwise", "gemms"])
def test_captured_operations_are_faster_than_launched_ones(kind: str):
    launched, captured = (
        measured("subject=ops", f"subject.kind={kind}", f"graphs={one}") for one in ("none", "manual")
    )
    assert captured.metrics["latency_ms/p50"] < launched.metrics["latency_ms/p50"]
    assert captured.metrics["graphs/kernels"] >= {"elementwise": 100, "gemms": 50}[kind]


@pytest.mark.parametrize("op", ["rms_norm", "gated_activation", "skinny_gemm"])
def test_kernel(op: str):
    made = measured("subject=kernel", f"subject.op={op}", "subject.compiled=false")
    assert made.metrics["case_ratio/mean/eager"] > 1
    assert made.metrics["kernels_ms/other"] < made.metrics["latency_ms/p50"]


@pytest.mark.parametrize(
    "words",
    ["gemm=blas", "gemm=cublas", "gemm=cublaslt", "gemm=tunable", "gemm=triton", "precision=fp8", "fusion=projections"],
)
def test_products(words: str):
    made = measured("subject=products", "graphs=manual", words, *SHALLOW)
    apart, together = made.metrics["cases/ms"], made.metrics["latency_ms/p50"]
    assert apart == pytest.approx(together, rel=0.5)
    assert 0.05 < made.metrics["cases/share"] < 1.1
