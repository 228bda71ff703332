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
    assert {name for name, one in discover().items() if not one.interpretable} == {"stream_ring"}


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
