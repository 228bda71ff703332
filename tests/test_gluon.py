"""Kernels in Gluon compute what their references do: under the small interpreter of `gluon_fake`.

On a GPU, as they are: `test_kernels`.
"""

from types import SimpleNamespace
from typing import Any

import gluon_fake
import pytest
import torch

from pi0exp.kernels import (
    gemm_epilogue,
    meetings,
    ring,
    ring_phases,
    stream_k_gemm,
    stream_layers_cases,
    stream_pack,
    stream_ring,
)
from pi0exp.kernels import kernel as contract
from pi0exp.kernels.kernel import Kernel, check, discover

CPU = torch.device("cpu")


def described(tensor: torch.Tensor, block: list[int], layout: object) -> SimpleNamespace:
    return SimpleNamespace(base=tensor)


def wrong(kernel: Kernel, case: contract.Case, op: Any) -> list[str]:
    return [f"{one.output}: {one.wrong}" for one in check(kernel, case, CPU, op) if one.wrong]


def test_every_kernel_in_gluon_is_here():
    assert {name for name, one in discover().items() if not one.interpretable} == {"stream_ring", "stream_k_gemm"}


# ---- stream-K


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((130, 264, 136), {"bias": True, "activation": "gelu_tanh"}),
        ((256, 128, 640), {"bias": True, "residual": True}),
        ((100, 120, 1024), {"residual": True}),
        ((384, 384, 64), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("multiprocessors", [1, 4, 7])
def test_stream_k(sizes: tuple[int, int, int], more: dict[str, Any], multiprocessors: int, monkeypatch):
    gpu = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(stream_k_gemm, "TensorDescriptor", SimpleNamespace(from_tensor=described))
    [kernel] = stream_k_gemm.KERNELS
    made = stream_k_gemm._case("a case", *sizes, pi0=False, **more)

    def op(x: torch.Tensor, weight: torch.Tensor, parts: torch.Tensor, flags: torch.Tensor, *rest: Any) -> Any:
        parts = torch.full((multiprocessors, 128, 128), float("nan"))
        flags = torch.zeros(multiprocessors, dtype=torch.int32)
        with gluon_fake.interpreted(gemm_epilogue, ring, stream_k_gemm):
            y = kernel.op._init_fn(x, weight, parts, flags, *rest)
        assert not flags.any()
        return y

    assert wrong(kernel, made, op) == []


# ---- the ring


def ring_case(layers: int, rows: int, **more: Any) -> contract.Case:
    made = stream_layers_cases.case("a case", layers, rows, stream_layers_cases.PI0, packed=stream_ring._packed, **more)
    assert not made.pi0
    return made


@pytest.mark.parametrize(
    "made",
    [
        ring_case(2, 3, start=20, settled=0),
        pytest.param(ring_case(1, 16, start=968, settled=968, hidden=True), marks=pytest.mark.slow),
        pytest.param(ring_case(2, 10, start=70, settled=69, adaptive=True), marks=pytest.mark.slow),
    ],
    ids=["a short cache", "16 rows, hidden keys", "adaptive"],
)
def test_ring(made: contract.Case, monkeypatch):
    monkeypatch.setattr(stream_ring, "TensorDescriptor", SimpleNamespace(from_tensor=described))
    [kernel] = stream_ring.KERNELS

    def op(*given: Any) -> Any:
        with gluon_fake.interpreted(gemm_epilogue, meetings, ring, ring_phases, stream_pack, stream_ring):
            found = kernel.op._init_fn(*given)
        assert not given[-2].any()  # the counters of the meetings
        return found

    assert wrong(kernel, made, op) == []
