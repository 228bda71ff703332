"""TunableOp: when it tunes, which tables it takes, what it keeps; pretended where there is no GPU."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain_config, subject_of, tiny_observation, tiny_policy

from pi0exp import build, config
from pi0exp.errors import UserError
from pi0exp.gemm import tunable as module
from pi0exp.gemm.tunable import TABLE, Tunable, differences, read_table, table_text
from pi0exp.machine import Machine
from pi0exp.policy import Policy

GPU = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")
HERE = {"PT_VERSION": "2.11.0", "ROCM_VERSION": "7.0.0,rc", "GCN_ARCH_NAME": "gfx942"}
ROW = ("GemmTunableOp_BFloat16_TN", "tn_2048_788_16384_ld_16384_16384_2048", "Gemm_Hipblaslt_618300", 0.061735)
DEFAULT = ("GemmTunableOp_float_TN", "tn_32_10_1024_ld_1024_1024_32", "Default", 0.004)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


class Pretended:
    """torch.cuda.tunable: `product` is what happens when a matrix product of some shape is called."""

    def __init__(self) -> None:
        self.on = self.tuning = False
        self.rows: dict[tuple[str, str], tuple[str, float]] = {}
        self.tuned: list[str] = []
        self.settings: dict[str, Any] = {}
        self.takes = True

    def product(self, shape: str) -> None:
        if self.on and self.tuning and ("op", shape) not in self.rows:
            self.tuned.append(shape)
            self.rows["op", shape] = ("Default", 0.5)

    def enable(self, value: bool) -> None:
        self.on = value

    def is_enabled(self) -> bool:
        return self.on

    def tuning_enable(self, value: bool) -> None:
        self.tuning = value and self.settings.get("env", True)

    def tuning_is_enabled(self) -> bool:
        return self.tuning

    def set_filename(self, name: str) -> None:
        self.settings["file"] = name

    def set_max_tuning_duration(self, value: int) -> None:
        self.settings["ms"] = self.settings.get("ms_by_environment", value)

    def get_max_tuning_duration(self) -> int:
        return self.settings["ms"]

    def set_max_tuning_iterations(self, value: int) -> None:
        self.settings["iterations"] = value

    def get_max_tuning_iterations(self) -> int:
        return self.settings["iterations"]

    def set_rotating_buffer_size(self, value: int) -> None:
        self.settings["rotating"] = value

    def get_validators(self) -> tuple[tuple[str, str], ...]:
        return tuple(HERE.items())

    def get_results(self) -> tuple[tuple[str, str, str, float], ...]:
        return tuple((*key, *value) for key, value in self.rows.items())

    def read_file(self, path: str) -> bool:
        for operator, shape, candidate, ms in read_table(path)[1] if self.takes else []:
            self.rows[operator, shape] = (candidate, float(ms))
        return True


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    made = Pretended()
    monkeypatch.setattr(module, "tunable", made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / TABLE
    path.write_text(table_text(HERE, [ROW, DEFAULT]))
    return str(path)


def applied(option: Tunable, on_call: Callable[[], None] = lambda: None) -> Policy:
    """A policy that calls `on_call` in each call."""
    policy = tiny_policy(num_steps=1)
    policy.begin("gemm")

    def counted(call: Any) -> Any:
        return lambda observation, noise_BCA: (on_call(), call(observation, noise_BCA))[1]

    policy.wrap_call(counted, "a toy")
    option.apply(policy)
    return policy


ONE, TWO = tiny_observation([(1, 1, 1)], [8]), tiny_observation([(1, 0, 1)], [5])


def test_each_structure_is_tuned_in_its_first_call_only(pretended: Pretended):
    calls: list[bool] = []

    def on_call() -> None:
        calls.append(pretended.tuning)
        pretended.product("tn_1")

    policy = applied(Tunable(max_duration_ms=5, max_iterations=7, rotating_buffer_mb=0), on_call)
    assert pretended.on
    assert not pretended.tuning
    assert pretended.settings == {"file": "/dev/null", "ms": 5, "iterations": 7, "rotating": 0}
    for given in (ONE, ONE, TWO, TWO, ONE):
        policy.sample_actions(given)
    assert calls == [True, False, True, False, False]
    assert pretended.tuned == ["tn_1"]
    counters = policy.counters()
    assert counters.pop("tunable/tune_s") > 0
    assert counters == {
        "tunable/products": 1,
        "tunable/not_default": 0,
        "tunable/from_table": 0,
        "tunable/tuned_here": 1,
    }


def test_tuning_ends_with_a_call_that_fails(pretended: Pretended):
    def fail() -> None:
        raise ValueError("a toy")

    policy = applied(Tunable(), fail)
    with pytest.raises(ValueError, match="a toy"):
        policy.sample_actions(ONE)
    assert not pretended.tuning


def test_nothing_is_tuned_inside_of_a_capture(pretended: Pretended, monkeypatch: pytest.MonkeyPatch):
    policy = applied(Tunable(), lambda: pretended.product("tn_1"))
    policy.sample_actions(ONE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    policy.sample_actions(ONE)
    with pytest.raises(RuntimeError, match="would be tuned inside of a capture"):
        policy.sample_actions(TWO)


@pytest.mark.usefixtures("pretended")
def test_that_no_product_comes_by_is_an_error():
    with pytest.raises(RuntimeError, match="no product of the policy came by TunableOp"):
        applied(Tunable()).sample_actions(ONE)


# ---- tables


def test_table_is_kept_and_can_be_read_again(pretended: Pretended, tmp_path: Path):
    policy = applied(Tunable(), lambda: pretended.product("tn_1"))
    policy.sample_actions(ONE)
    (tmp_path / TABLE).write_text(policy.attachments()[TABLE])
    assert read_table(str(tmp_path / TABLE)) == (HERE, [["op", "tn_1", "Default", "0.5"]])


def test_what_a_table_has_is_not_tuned_again(pretended: Pretended, table: str):
    policy = applied(Tunable(table=table), lambda: pretended.product("tn_new"))
    policy.sample_actions(ONE)
    assert pretended.tuned == ["tn_new"]
    counters = policy.counters()
    assert (counters["tunable/from_table"], counters["tunable/tuned_here"]) == (2, 1)
    assert counters["tunable/not_default"] == 1


def test_table_of_another_machine_is_refused_with_what_differs(pretended: Pretended, table: str):
    other = HERE | {"GCN_ARCH_NAME": "gfx950", "EXTRA": "1"}
    del other["PT_VERSION"]
    Path(table).write_text(table_text(other, [ROW]))
    with pytest.raises(UserError, match="was tuned elsewhere") as caught:
        applied(Tunable(table=table))
    assert str(caught.value).endswith(
        "EXTRA is 1 in the table and missing here; GCN_ARCH_NAME is gfx950 in the table and gfx942 here; "
        "PT_VERSION is missing in the table and 2.11.0 here"
    )
    assert pretended.rows == {}
    assert differences(HERE, HERE) == []


def test_lines_that_pytorch_drops_are_an_error(pretended: Pretended, table: str):
    pretended.takes = False
    with pytest.raises(UserError, match="PyTorch did not take 2 lines, the first is GemmTunableOp_BFloat16_TN,"):
        applied(Tunable(table=table))


@pytest.mark.parametrize("text", ["", "Validator,PT_VERSION,2.11.0\n", "a,b,c,1\n", "Validator,A,1\na,b\n"], ids=repr)
def test_what_is_no_table_is_refused(table: str, text: str):
    Path(table).write_text(text)
    with pytest.raises(UserError, match=r"gemm\.table .* is no table of TunableOp") as caught:
        config.stack(plain_config("gemm=tunable", f"gemm.table={table}"))
    assert "\n" not in str(caught.value)


# ---- settings


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["gemm.max_duration_ms=0"], "gemm.max_duration_ms is 0; it must be 1 or more"),
        (["gemm.max_iterations=0"], "gemm.max_iterations is 0; it must be 1 or more"),
        (["gemm.rotating_buffer_mb=-1"], "gemm.rotating_buffer_mb is -1; it must not be negative"),
        (["gemm.table=/no/such.csv"], "gemm.table /no/such.csv cannot be read"),
    ],
)
def test_wrong_settings_are_told_in_one_line(words: list[str], reason: str):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        config.stack(plain_config("gemm=tunable", *words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("env", False, "PYTORCH_TUNABLEOP_TUNING makes TunableOp use False instead of True"),
        ("ms_by_environment", 99, "PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS makes TunableOp use 99 instead of 30"),
    ],
)
def test_environment_that_wins_is_refused(pretended: Pretended, setting: str, value: Any, reason: str):
    pretended.settings[setting] = value
    with pytest.raises(UserError, match=reason):
        applied(Tunable())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["gemm.denoise=tunable"], "gemm.denoise: tunable holds for the whole process, not for one stage"),
        (["gemm=tunable", "gemm.vision=blas"], "gemm: tunable holds for the whole process: vision cannot have BLAS"),
    ],
)
def test_single_stages_are_refused(words: list[str], reason: str):
    (found,) = build.unmet(config.stack(plain_config(*words)), GPU)
    assert found.startswith(reason)


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("graphs", ["none", "manual", "split"])
def test_tuned_on_a_gpu(graphs: str, tmp_path: Path):
    """On CUDA the only candidate is PyTorch's own, on ROCm there are others."""
    shallow = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
    words = (*shallow, "attention=sdpa", "gemm=tunable", "gemm.max_duration_ms=2", f"graphs={graphs}")
    try:
        instance = subject_of(*words).build(torch.device("cuda", 0), 8, lambda text: None)
        assert instance.verdict.wrong == []
        first = instance.counters()
        assert first["tunable/products"] > 10
        path = tmp_path / TABLE
        path.write_text(instance.policy.attachments()[TABLE])
        again = subject_of(*words, f"gemm.table={path}").build(torch.device("cuda", 0), 8, lambda text: None)
        assert again.verdict.wrong == []
        # The process has them all from before, from the table or not: what the table holds is what was tuned.
        assert again.counters()["tunable/tuned_here"] == 0
        assert again.counters()["tunable/from_table"] == first["tunable/products"]
    finally:
        torch.cuda.tunable.enable(False)


@pytest.mark.parametrize(
    "words", [["fusion=kernels"], ["fusion.rewrites.cache_room=true"], ["fusion.rewrites.hoist_state=true"]], ids=str
)
def test_keys_and_values_in_one_buffer_are_refused(words):
    """TunableOp's copies of batched operands forget how far apart the rows are."""
    assert build.unmet(config.stack(plain_config("gemm=tunable", "fusion=projections")), GPU) == []
    reasons = build.unmet(config.stack(plain_config("gemm=tunable", *words)), GPU)
    assert len(reasons) == 1
    assert reasons[0].startswith("gemm: TunableOp reads beyond its copies")
