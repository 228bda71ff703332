"""`gemm=lt_tuned` where there is a cuBLASLt: what it finds is right, no slower than the first, and is kept."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_gpu import built, shallow

from pi0exp import cublaslt
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gemm.lt_search import APART, Shape, fastest
from pi0exp.gemm.lt_table import read_table
from pi0exp.gemm.lt_tune import operands
from pi0exp.gemm.lt_tuned import ARTIFACT
from pi0exp.policy_subject import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.cuda is None, reason="needs a GPU of NVIDIA's; there is none"
    ),
]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "shape", [Shape(768, 1152, 4304, True), Shape(788, 2048, 2048, False), Shape(11, 1024, 4096, False)], ids=str
)
def test_the_fastest_is_right_and_no_slower_than_the_first(shape: Shape):
    x, weights, bias = operands(shape, DEVICE)
    found = fastest(x, weights, bias)
    assert found.us <= found.first_us
    assert found.tried > 8
    product = cublaslt.Problem(shape.M, shape.N, shape.K, shape.bias).product(found.algorithm)
    workspace = torch.empty(cublaslt.WORKSPACE, dtype=torch.uint8, device=DEVICE)
    for weight in weights[:3]:
        out = x.new_empty(shape.M, shape.N)
        product(x, weight, bias, out, workspace)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert (out.double() - exact).norm() <= APART / 2 * exact.norm()


def test_an_algorithm_of_another_shape_is_refused():
    with pytest.raises(cublaslt.CublasLtError, match="cublasLt"):
        cublaslt.Problem(768, 1152, 4304, True).product(cublaslt.Algorithm(66, 9999, 1, 0, 0, 1, 35, 0, 3))


@pytest.mark.parametrize(
    "stack", [["gemm=lt_tuned", "graphs=manual"], ["stack=12_tuned"], ["stack=library_tuned"]], ids=" ".join
)
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_a_policy_with_it(model: str, stack: list[str]):
    instance = built(f"model={model}", *stack)
    assert instance.verdict.wrong == []
    counters = instance.counters()
    assert counters["cublaslt/products_vision"] >= 4
    assert counters["cublaslt/products_prefill"] >= 4


def test_what_was_tuned_is_kept_and_taken_again(tmp_path: Path):
    """A second policy with the table of the first tunes nothing and computes the same bits."""
    first = shallow("gemm=lt_tuned", "workload.prompt_tokens=13")
    inputs = first.on_device(first.inputs(2).items, DEVICE)
    policy = first.policy(DEVICE)
    found = run(policy, inputs)
    assert policy.counters()["cublaslt/tuned_here_prefill"] > 0
    table = tmp_path / ARTIFACT
    table.write_text(policy.attachments()[ARTIFACT])
    assert read_table(table).version == cublaslt.version()

    again = shallow("gemm=lt_tuned", f"gemm.table={table}", "gemm.strict=true", "workload.prompt_tokens=13")
    policy = again.policy(DEVICE)
    for a, b in zip(found, run(policy, inputs), strict=True):
        assert torch.equal(a, b)
    assert policy.counters()["cublaslt/tuned_here_prefill"] == 0

    other = shallow(
        "gemm=lt_tuned", f"gemm.table={table}", "gemm.strict=true", "workload.prompt_tokens=13", "workload.batch_size=2"
    )
    with pytest.raises(UnsupportedError, match=r"gemm\.strict: cublaslt\.json has no row for \d+ x"):
        run(other.policy(DEVICE), other.on_device(other.inputs(1).items, DEVICE))

    table.write_text(json.dumps(json.loads(table.read_text()) | {"cublaslt": 1}))
    with pytest.raises(UserError, match=r"was made for sm_\d+ and cuBLASLt 1; here are"):
        again.policy(DEVICE)
