"""Kernels in Gluon compute what their references do: under the small interpreter of `gluon_fake`.

On a GPU, as they are: `test_kernels`.
"""

from types import SimpleNamespace
from typing import Any

import gluon_fake
import pytest
import torch

from pi0exp.kernels import (
    attention_halves,
    gemm_epilogue,
    meetings,
    ring,
    ring_phases,
    step_phases,
    stream_layers_cases,
    stream_pack,
    stream_ring,
    stream_wide,
    wide,
    wide_phases,
)
from pi0exp.kernels import kernel as contract
from pi0exp.kernels.kernel import Kernel, check, discover

CPU = torch.device("cpu")


def described(tensor: torch.Tensor, block: list[int], layout: object) -> SimpleNamespace:
    return SimpleNamespace(base=tensor)


def wrong(kernel: Kernel, case: contract.Case, op: Any) -> list[str]:
    return [f"{one.output}: {one.wrong}" for one in check(kernel, case, CPU, op) if one.wrong]


def test_every_kernel_in_gluon_is_here():
    ours = {name for name, one in discover().items() if not one.interpretable}
    assert ours == {"attend_halves", "stream_ring", "stream_wide"}


SHARED = (gemm_epilogue, meetings, step_phases, stream_pack)
MODULES = {
    "stream_ring": (stream_ring, ring, ring_phases, *SHARED),
    "stream_wide": (stream_wide, wide, wide_phases, ring, *SHARED),
}


def case(rows: int, start: int, settled: int, layers: int = 1, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "layers": layers, "more": {"start": start, "settled": settled, **more}}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("stream_ring", case(3, 20, 0, layers=2)),
        pytest.param("stream_ring", case(16, 968, 968, hidden=True), marks=pytest.mark.slow),
        pytest.param("stream_ring", case(10, 70, 69, layers=2, adaptive=True), marks=pytest.mark.slow),
        ("stream_wide", case(19, 20, 0, layers=2)),
        pytest.param("stream_wide", case(64, 1000, 998, hidden=True), marks=pytest.mark.slow),
        pytest.param("stream_wide", case(50, 70, 69, layers=2, adaptive=True), marks=pytest.mark.slow),
    ],
)
def test_all_layers_of_a_step(name: str, sizes: dict[str, Any], monkeypatch):
    module, *others = MODULES[name]
    monkeypatch.setattr(module, "TensorDescriptor", SimpleNamespace(from_tensor=described))
    [kernel] = module.KERNELS
    made = stream_layers_cases.case(
        "a case", sizes["layers"], sizes["rows"], stream_layers_cases.PI0, packed=module._packed, **sizes["more"]
    )
    assert not made.pi0

    def op(*given: Any) -> Any:
        with gluon_fake.interpreted(module, *others):
            found = kernel.op._init_fn(*given)
        assert not given[-2].any()  # the counters of the meetings
        return found

    assert wrong(kernel, made, op) == []


@pytest.mark.parametrize(
    "name",
    [
        "keys and values in a larger cache",
        "one block of keys",
        "the first keys hidden",
        pytest.param("prefill, middle camera absent", marks=pytest.mark.slow),
    ],
)
def test_attention_in_two_halves(name: str, monkeypatch):
    monkeypatch.setattr(attention_halves, "TensorDescriptor", SimpleNamespace(from_tensor=described))
    [kernel] = attention_halves.KERNELS
    [made] = [one for one in kernel.cases if one.name == name]

    def op(*given: Any) -> Any:
        with gluon_fake.interpreted(attention_halves, ring):
            return kernel.op._init_fn(*given)

    assert wrong(kernel, made, op) == []
    q, k, v = (torch.zeros(2, 3, heads, 256, dtype=torch.bfloat16) for heads in (8, 1, 1))
    with pytest.raises(ValueError, match="batch 2, 1 key/value heads of 256: it takes batch 1"):
        op(q, k, v, None, False, 1.0)
