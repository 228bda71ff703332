"""A Triton kernel as a subject, as far as it needs no GPU: kernels are stood in for by PyTorch's own."""

import re

import pytest
import torch
from helpers import CPU, plain_config
from omegaconf import OmegaConf

from pi0exp import compose, config, subject
from pi0exp.errors import UserError
from pi0exp.kernels import kernel as kernels
from pi0exp.kernels.bench import OP, Contestant, Row
from pi0exp.kernels.kernel import Case, Kernel, discover, random
from pi0exp.machine import Machine
from pi0exp.roofline import Ceilings
from pi0exp.subject import Detailed
from pi0exp.subjects.kernel import KernelInstance, KernelSubject, slug, told

METRIC = re.compile(r"[\w./: -]+")
CEILINGS = Ceilings(bytes_per_s=4e12, flops_per_s=8e14)
H200 = Machine("NVIDIA H200", "nvidia", "sm_90", 143771)


def kernel_of(*words: str) -> KernelSubject:
    made = subject.subject(plain_config("subject=kernel", *words))
    assert isinstance(made, KernelSubject)
    return made


def pretended(monkeypatch: pytest.MonkeyPatch, op) -> KernelSubject:
    """A kernel `double` whose op is an ordinary function, with two cases of the policy."""

    def make(generator, device):
        return (random(generator, device, 3, 5),)

    def library(x):
        raise NotImplementedError("takes no doubles")

    cases = (
        Case("prefill, 3 x 5", make, bytes_moved=60.0),
        Case("odd", make, pi0=False),
        Case("denoise", make, flops=8e9),
    )
    made = Kernel(
        "double", op, lambda x: (x.double() * 2).to(x.dtype), cases, (), {"other": torch.add, "none": library}
    )
    object.__setattr__(made, "libraries", {"other": lambda x: x + x, "none": library})
    monkeypatch.setattr(kernels, "discover", lambda: {"double": made})
    return kernel_of("subject.op=double", "subject.compiled=false")


# ---- settings


def test_unknown_kernel_is_told_with_the_known_ones():
    with pytest.raises(UserError, match=r"subject\.op is 'rmsnorm'; choose one of .*rms_norm"):
        kernel_of("subject.op=rmsnorm").preflight()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("attention=sdpa", "attention=sdpa has no effect with subject=kernel; leave attention as it is"),
        ("graphs=manual", "graphs=manual has no effect with subject=kernel"),
        ("subject.replay_us=-1", "subject.replay_us is -1.0; it must be above 0"),
    ],
)
def test_what_would_do_nothing_is_refused(words: str, cause: str):
    with pytest.raises(UserError) as error:
        kernel_of(words)
    assert str(error.value).startswith(cause)


def test_a_cpu_is_unsupported_with_the_reason():
    [reason] = kernel_of().unmet(Machine())
    assert reason.startswith("subject.op=rms_norm needs a GPU of nvidia or amd")
    assert "interpreter" in reason
    assert kernel_of().unmet(H200) == []


def test_study_has_every_kernel():
    study = OmegaConf.load(compose.files()["study"]["kernels"])
    assert sorted(study.hydra.sweeper.params["subject.op"].split(",")) == sorted(discover())


@pytest.mark.parametrize("name", sorted(discover()))
def test_every_kernel_has_cases_and_a_proof(name: str):
    made = kernel_of(f"subject.op={name}")
    assert made.cases
    [(what, pattern)] = made.proofs()
    assert what == name
    assert re.search(pattern, made.kernel.ahead_of_time[0].function.__name__)
    names = [slug(case.name) for case in made.cases]
    assert len(set(names)) == len(names)


# ---- verified and timed


def test_right_kernel_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch):
    made = pretended(monkeypatch, lambda x: x * 2)
    instance = made.build(CPU, 3, lambda text: None)
    assert isinstance(instance, Detailed)
    assert instance.verdict.wrong == []
    instance.call(4)
    instance.call_host(0)
    assert instance.recheck() == []
    details = instance.details(config.MeasureConfig(samples=20), CEILINGS, lambda text: None)
    assert set(details.samples) == {
        f"case_us/{case}/{who}" for case in ("prefill_3_x_5", "denoise") for who in ("op", "eager", "other")
    }
    assert all(len(samples) == 7 for samples in details.samples.values())
    assert {"case_ratio/mean/eager", "case_ratio/mean/library", "case_share/denoise"} <= set(details.metrics)
    assert all(METRIC.fullmatch(name) for name in details.metrics)
    assert details.facts["not timed"].startswith("none on prefill, 3 x 5: declined: takes no doubles")


def test_a_call_runs_the_op_on_every_case_with_other_inputs(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []

    def op(x):
        seen.append(float(x.sum()))
        return x * 2

    instance = pretended(monkeypatch, op).build(CPU, 3, lambda text: None)
    calls = []
    for index in (0, 1, 2):
        seen.clear()
        instance.call(index)
        calls.append(tuple(seen))
    assert [len(sums) for sums in calls] == [2, 2, 2]
    assert len(set(calls)) > 1


def test_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    instance = pretended(monkeypatch, lambda x: x * 2.1).build(CPU, 3, lambda text: None)
    assert isinstance(instance, KernelInstance)
    assert len(instance.verdict.wrong) == 2
    assert instance.verdict.wrong[0].startswith("prefill, 3 x 5: result 0: ")


def row(case: str, **us: float) -> Row:
    return Row("k", case, 0.0, 4e6, 8, 8, [Contestant(name, samples_us=[value]) for name, value in us.items()])


def test_ratios_are_multiples_of_the_op_and_their_mean_geometric():
    cases = [Case(name, lambda generator, device: (), bytes_moved=4e6) for name in ("a", "b")]
    rows = [row("a", op=2.0, eager=8.0, cudnn=6.0, flash=3.0), row("b", op=4.0, eager=4.0, compile=2.0)]
    made = told(rows, cases, CEILINGS).metrics
    assert made["case_us/a/op"] == 2
    assert made["case_ratio/a/eager"] == 4
    assert made["case_share/a"] == pytest.approx(0.5)  # 4 MB at 4 TB/s are 1 us
    assert made["case_ratio/mean/eager"] == pytest.approx(2.0)  # of 4 and 1
    assert made["case_ratio/mean/compile"] == pytest.approx(0.5)
    assert made["case_ratio/mean/library"] == pytest.approx(1.5)  # the faster one


def test_an_op_that_was_not_timed_is_an_error():
    case = Case("a", lambda generator, device: ())
    failed = Row("k", "a", 0.0, 0.0, 8, 8, [Contestant(OP, "error", "out of registers")])
    with pytest.raises(RuntimeError, match="k on a was not timed: out of registers"):
        told([failed], [case], CEILINGS)
