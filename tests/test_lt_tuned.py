"""`gemm=lt_tuned` without a GPU: which algorithm a product gets, and what it excludes; cuBLASLt pretended."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import lacking, noise_for, plain_config, tiny_observation, tiny_policy, traced
from torch import Tensor

from pi0exp import build, config, cublaslt
from pi0exp.compile_mode.default import Default
from pi0exp.compile_mode.inductor import Region
from pi0exp.cublaslt import Algorithm
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gemm import lt_tuned
from pi0exp.gemm.blas import Blas
from pi0exp.gemm.lt_search import Found, Shape
from pi0exp.gemm.lt_table import LtTable, read_table
from pi0exp.gemm.lt_tuned import ARTIFACT, LtTuned
from pi0exp.machine import Machine
from pi0exp.model.precision import BF16
from pi0exp.policy import Policy

GPU = Machine(gpu="NVIDIA H100 80GB HBM3", vendor="nvidia", arch="sm_90")
ALGORITHM = Algorithm(66, 18, 1, 0, 0, 3, 35, 0, 9)
FASTER, SAME = Found(ALGORITHM, 16.0, 23.0, 70), Found(ALGORITHM, 9.0, 9.0, 8)


class Pretended:
    """cuBLASLt: every algorithm multiplies; those that a product was made with, and used, are noted."""

    def __init__(self) -> None:
        self.made: list[tuple[Shape, Algorithm]] = []
        self.used: list[Algorithm] = []
        self.tuned: list[tuple[int, int]] = []

    def problem(self, M: int, N: int, K: int, bias: bool) -> Any:
        outer = self

        class Problem:
            def product(self, algorithm: Algorithm) -> Callable[..., None]:
                outer.made.append((Shape(M, N, K, bias), algorithm))

                def multiply(x: Tensor, weight: Tensor, b: Tensor | None, out: Tensor, workspace: Tensor) -> None:
                    outer.used.append(algorithm)
                    assert x.data_ptr() % cublaslt.ALIGNED == 0
                    assert (x.shape, weight.shape) == ((M, K), (N, K))
                    out.view(M, N).copy_(F.linear(x, weight, b))

                return multiply

        return Problem()

    def fastest(self, x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Found:
        assert len({one.shape for one in weights}) == 1
        self.tuned.append((len(x), len(weights)))
        return FASTER if bias is None else SAME


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    made = Pretended()
    monkeypatch.setattr(lt_tuned, "Problem", made.problem)
    monkeypatch.setattr(lt_tuned, "fastest", made.fastest)
    monkeypatch.setattr(lt_tuned, "this_machine", lambda: GPU)
    monkeypatch.setattr(lt_tuned, "_here", {})
    monkeypatch.setattr(cublaslt, "version", lambda: 130100)
    monkeypatch.setattr(cublaslt, "ALIGNED", 1)
    monkeypatch.setattr(lt_tuned, "ALIGNED", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def policy_with(option: LtTuned) -> Policy:
    policy = tiny_policy(precision=BF16)
    policy.begin("gemm")
    option.apply(policy)
    return policy


def acted(policy: Policy) -> Tensor:
    observation = tiny_observation()
    return policy.sample_actions(observation, noise_for(policy, observation))


def kept(policy: Policy, folder: Path) -> Path:
    """The table that would be kept with the result."""
    path = folder / ARTIFACT
    path.write_text(policy.attachments()[ARTIFACT])
    return path


def test_same_actions_each_shape_tuned_once(fake: Pretended):
    policy, plain = policy_with(LtTuned()), tiny_policy(precision=BF16)
    for _ in range(2):
        assert torch.equal(acted(policy), acted(plain))
    shapes = [shape for shape, _ in fake.made]
    assert len(set(shapes)) == len(fake.tuned)
    assert {shape.M for shape in shapes} == {16, 56, 11}, "patches, prefix and suffix"
    assert max(count for _, count in fake.tuned) > 1, "weights of several layers take turns"
    counters = policy.counters()
    for stage in ("vision", "prefill", "denoise"):
        assert counters[f"cublaslt/tuned_here_{stage}"] == counters[f"cublaslt/products_{stage}"] > 0
    assert counters["cublaslt/not_first_vision"] < counters["cublaslt/products_vision"], "those with a bias"
    assert counters["cublaslt/not_first_prefill"] == counters["cublaslt/products_prefill"]
    lines = policy.applied["gemm"]
    assert "cublaslt_sm_90.json: " in lines[0]
    assert any(line.endswith(": 16.0 us, the first suggestion 23.0 (tuned here)") for line in lines)
    assert any("Linear that are not of bf16 stay with BLAS" in line for line in lines)


def test_another_policy_of_the_process_takes_the_same(fake: Pretended):
    acted(policy_with(LtTuned()))
    before = len(fake.tuned)
    acted(policy_with(LtTuned()))
    assert len(fake.tuned) == before
    assert len(fake.made) == 2 * len(set(fake.made)), "made anew for each policy, with the same algorithm"


def test_what_was_tuned_is_a_table(fake: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = policy_with(LtTuned())
    actions = acted(first)
    path = kept(first, tmp_path)
    monkeypatch.setattr(lt_tuned, "_here", {})
    fake.tuned.clear()
    again = policy_with(LtTuned(table=str(path), strict=True))
    assert torch.equal(acted(again), actions)
    assert fake.tuned == []
    assert sum(value for name, value in again.counters().items() if "tuned_here" in name) == 0
    assert kept(again, tmp_path).read_text() == path.read_text()
    assert LtTuned(table=str(path)).files() == [str(path)]


def test_stages_by_themselves_keep_one_table(fake: Pretended, tmp_path: Path):
    """As `gemm.vision=lt_tuned gemm.prefill=lt_tuned` has them: an option each."""
    policy = tiny_policy(precision=BF16)
    policy.begin("gemm")
    Blas(vision=LtTuned(), prefill=LtTuned()).apply(policy)
    acted(policy)
    assert {shape.M for shape in read_table(kept(policy, tmp_path)).rows} == {16, 56}
    names = set(policy.counters())
    assert {"cublaslt/products_vision", "cublaslt/products_prefill", "cublaslt/tune_s"} <= names


def test_strict_wants_a_row(fake: Pretended, tmp_path: Path):
    """Also where another policy of the process has tuned the shape."""
    acted(policy_with(LtTuned()))
    path = tmp_path / "table.json"
    path.write_text(LtTable("sm_90", 130100, {}, {Shape(1, 2, 3, False): SAME}).text())
    with pytest.raises(UnsupportedError, match=r"gemm\.strict: table\.json has no row for \d+ x \d+ x \d+ \+ bias"):
        acted(policy_with(LtTuned(table=str(path), strict=True)))


def test_nothing_is_tuned_inside_of_a_capture(fake: Pretended, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="would be tuned inside of a capture"):
        acted(policy_with(LtTuned()))


@pytest.mark.parametrize(("arch", "version"), [("sm_100", 130100), ("sm_90", 120900)])
def test_a_table_of_another_machine(fake: Pretended, tmp_path: Path, monkeypatch, arch: str, version: int):
    """A given one is refused; the shipped one is not used, and that is said."""
    table = LtTable(arch, version, {}, {Shape(11, 96, 32, False): SAME})
    path = tmp_path / "table.json"
    path.write_text(table.text())
    with pytest.raises(UserError, match=rf"table\.json was made for {arch} and cuBLASLt {version}; here are sm_90 and"):
        policy_with(LtTuned(table=str(path)))
    monkeypatch.setattr(lt_tuned, "shipped", lambda arch: path)
    policy = policy_with(LtTuned())
    acted(policy)
    assert policy.applied["gemm"][0].startswith(f"table.json: made for {arch} and cuBLASLt {version}; here")
    assert policy.counters()["cublaslt/tuned_here_denoise"] > 0


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces, in a Dynamo of this test's own."""
    monkeypatch.setattr(torch, "compile", traced)
    with torch._dynamo.config.patch():
        yield
        torch._dynamo.reset()


def compiled_with(option: LtTuned, region: Region) -> Policy:
    policy = policy_with(option)
    policy.begin("compile_mode")
    Default(region=region).apply(policy)
    return policy


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("region", list(Region))
def test_compiled_code_multiplies_with_it(fake: Pretended, region: Region):
    """The same actions, and the same products as without a compiler; counted in the policy that is called."""
    plain, compiled = policy_with(LtTuned()), compiled_with(LtTuned(), region)
    wanted = acted(plain)
    made = set(fake.made)
    fake.made.clear()
    assert torch.equal(acted(compiled), wanted)
    assert set(fake.made) == made
    names = [name for name in plain.counters() if name.startswith("cublaslt/products")]
    assert len(names) == 3
    assert [compiled.counters()[name] for name in names] == [plain.counters()[name] for name in names]


@pytest.mark.usefixtures("no_code")
def test_compiled_code_does_not_take_another_policys_table(fake: Pretended, tmp_path: Path):
    """Each keeps its algorithms while both live; what was compiled for one that is gone serves its twin."""
    first = compiled_with(LtTuned(), Region.block)
    actions = acted(first)
    path = kept(first, tmp_path)
    path.write_text(path.read_text().replace('"custom": 3', '"custom": 5'))
    second = compiled_with(LtTuned(table=str(path)), Region.block)
    third = compiled_with(LtTuned(), Region.block)

    def customs(policy: Policy) -> set[int]:
        """Of the algorithms that a call used."""
        fake.used.clear()
        assert torch.equal(acted(policy), actions)
        return {algorithm.custom for algorithm in fake.used}

    assert [customs(policy) for policy in (second, third, first)] == [{5}, {3}, {3}]
    del third
    gc.collect()
    assert [customs(policy) for policy in (first, second)] == [{3}, {5}]


def test_a_weight_that_is_a_part_is_an_error(fake: Pretended, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lt_tuned, "ALIGNED", 2**40)
    with pytest.raises(RuntimeError, match="is a part of another tensor"):
        acted(policy_with(LtTuned()))


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.ones(3, 8, dtype=torch.bfloat16), None),
        (torch.ones(3, 4), None),
        (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(2)),
    ],
    ids=["width", "dtype", "dtype of bias"],
)
def test_operands_that_do_not_fit_are_refused(fake: Pretended, x: Tensor, bias: Tensor | None):
    """Where PyTorch would refuse them, too; by their addresses alone cuBLASLt would take them."""
    products = lt_tuned.Products(
        "vision",
        lt_tuned.Known(LtTuned(), lt_tuned.Used(torch.device("cpu")), lambda line: None),
        [],
        lambda line: None,
    )
    with pytest.raises(RuntimeError, match=r"x \[3, \d\] of torch\..*, weight \[2, 4\] of torch.bfloat16"):
        products.matmul(x, torch.ones(2, 4, dtype=torch.bfloat16), bias)
    assert fake.made == []


def test_what_it_does_not_go_with():
    def reasons(*words: str) -> list[str]:
        return build.unmet(config.stack(plain_config(*words)), GPU)

    assert reasons("gemm=lt_tuned") == []
    assert reasons("stack=12_tuned") == []
    assert reasons("stack=library_tuned") == []
    assert reasons("gemm=lt_tuned", "compile_mode=aggressive") == []
    for mode in ("max_autotune_no_graphs", "max_autotune"):
        (found,) = reasons("gemm.prefill=lt_tuned", f"compile_mode={mode}")
        assert found.startswith(
            "gemm.prefill: compile_mode.prefill would choose the products' kernels itself, but does"
        )
        assert len(reasons("gemm=lt_tuned", f"compile_mode={mode}")) == 3
        assert reasons("gemm.prefill=lt_tuned", f"compile_mode.vision={mode}") == []
    assert reasons("gemm.vision=lt_tuned", "compile_mode=reduce_overhead") == [
        "gemm.vision: compile_mode.vision captures from the first call on, in which products are tuned"
    ]
    assert any("products are of bf16" in one for one in reasons("gemm=lt_tuned", "precision=fp32"))
    assert any("gemm=LtTuned multiplies bf16 weights" in one for one in reasons("gemm=lt_tuned", "precision=fp8"))


def test_it_needs_a_gpu_of_nvidia():
    assert lacking("gemm", "lt_tuned") == ["gemm: needs a GPU of nvidia; this machine has no GPU that torch can use"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a cuBLASLt")
def test_without_cublaslt_the_reason_is_told():
    cublaslt.library.cache_clear()
    with pytest.raises(UserError, match=r"cuBLASLt comes with torch for CUDA; torch .* is none"):
        cublaslt.version()
