"""Layers and chains of operations as subjects: what they compute, how they are verified, what they refuse."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import CPU, PretendedGraph, plain_config
from torch.utils._python_dispatch import TorchDispatchMode

from pi0exp import subject, verify
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.fusion.fusion import Fusion
from pi0exp.graphs import capture
from pi0exp.graphs.manual import Manual
from pi0exp.machine import Machine
from pi0exp.model.layers import Attention, eager_attend
from pi0exp.model.precision import FP32
from pi0exp.option import Numerics, Option
from pi0exp.point import run_params
from pi0exp.policy import Policy
from pi0exp.roofline import VALUE_BYTES
from pi0exp.stack_work import computed, stack_work
from pi0exp.subjects.layers import LayersSubject
from pi0exp.subjects.measured import PartInstance, PartSubject
from pi0exp.subjects.ops import OpsSubject
from pi0exp.subjects.part import Given
from pi0exp.title import title

H200 = Machine("NVIDIA H200", "nvidia", "sm_90", 143771)


def part_of(*words: str) -> PartSubject:
    made = subject.subject(plain_config(*words))
    assert isinstance(made, PartSubject)
    return made


def built(made: PartSubject, **options: Option) -> PartInstance:
    """On the CPU, with other options in its stack."""
    whole = replace(made.whole, stack=replace(made.whole.stack, **options))
    return replace(made, whole=whole).build(CPU, 2, lambda text: None)


# ---- settings


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("subject=layers subject.depth=0", "subject.depth is 0; it must be 1 or more"),
        ("subject=layers subject.rows=0", "subject.rows is 0; it must be 1 or more, or null"),
        ("subject=ops subject.count=0", "subject.count is 0; it must be 1 or more, or null"),
        ("subject=ops subject.kind=scalars", "subject.kind: Invalid value 'scalars'"),
        ("subject=layers subject.depth=four", "subject.depth: Value 'four'"),
        ("subject=layers +subject.width=3", "subject.width: Key 'width' not in 'LayersConfig'"),
    ],
)
def test_bad_settings_are_told_in_one_line(words: str, cause: str):
    with pytest.raises(UserError) as told:
        subject.subject(plain_config("model=tiny", *words.split()))
    assert str(told.value).startswith(cause)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "rows"), [("", 788), ("workload=masked", 532), ("model=tiny", 68), ("subject.rows=7 model=tiny", 7)]
)
def test_rows_are_those_of_the_prefix_that_are_real(words: str, rows: int):
    assert part_of("subject=layers", *words.split()).shape()[1] == rows


def test_chains_have_the_rows_and_width_of_a_step():
    assert part_of("subject=ops").shape() == (1, 11, 1024)
    assert part_of("subject=ops", "model=pi05", "workload=pi05").shape() == (1, 50, 1024)
    assert part_of("subject=ops", "subject.kind=transformer").shape() == (1, 788, 2048)


def test_params_and_name_tell_what_was_measured():
    plain = plain_config("model=tiny", "subject=layers", "subject.depth=2", "attention=sdpa")
    params = run_params(plain, subject.subject(plain))
    assert params["subject"] == "layers"
    assert (params["subject.depth"], params["subject.rows"], params["attention"]) == ("2", "68", "sdpa")
    assert title(params) == "layers  subject.depth=2  subject.rows=68  tiny  default  attention=sdpa"
    of_policy = plain_config("model=tiny")
    params = run_params(of_policy, subject.subject(of_policy))
    assert "subject" not in params
    assert title(params) == "tiny  default  plain"


# ---- what is computed


def test_layers_are_those_of_the_policy():
    """As many layers as the model has leave the very keys and values of its prefill."""
    made = part_of("subject=layers", "subject.depth=3", "model=tiny", "precision=fp32")
    part = made.part(FP32, CPU)
    x_BTD = torch.from_numpy(made.host_input(0))
    valid_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool)
    _, ours = part.model.prefill(x_BTD, valid_BT)
    theirs = made.whole.plain_policy(FP32, CPU).model.prefill(x_BTD, valid_BT, True)
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.k_BSKH, other.k_BSKH)
        assert torch.equal(mine.v_BSKH, other.v_BSKH)


def test_work_of_all_layers_is_that_of_the_prefill():
    made = part_of("subject=layers", "subject.depth=18")
    [ours] = made.work()
    whole = made.whole
    done = computed(whole.stack, False, [True] * 3, [20], 20)
    theirs = stack_work(whole.dimensions, done, 10, 10, VALUE_BYTES["bf16"])[1]
    assert ours.flops == theirs.flops
    assert ours.bytes_moved == pytest.approx(theirs.bytes_moved, rel=0.01)


class Seen(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "names", "count"), [("elementwise", ("mul", "add"), 100), ("gemms", ("mm",), 50)])
def test_a_chain_is_so_many_operations(kind: str, names: tuple[str, ...], count: int):
    made = part_of("subject=ops", f"subject.kind={kind}", "model=tiny")
    part = made.part(FP32, CPU)
    with torch.no_grad(), Seen() as seen:
        part.model(Given(), torch.from_numpy(made.host_input(0)))
    assert sum(name in names for name in seen.names) == count


def test_results_of_a_chain_keep_their_size():
    for kind in ("elementwise", "gemms"):
        made = part_of("subject=ops", f"subject.kind={kind}", "model=tiny")
        found = made.part(FP32, CPU).compute(Given(), torch.from_numpy(made.host_input(0)))
        assert 1e-2 < found.std() < 1e2


def test_inputs_differ_and_are_the_same_everywhere():
    made = part_of("subject=layers", "model=tiny")
    assert np.array_equal(made.host_input(1), made.host_input(1))
    assert not np.array_equal(made.host_input(0), made.host_input(1))


# ---- verified


@pytest.mark.parametrize(
    "words",
    [
        "subject=layers",
        "subject=layers attention=sdpa fusion=projections",
        "subject=layers attention=sdpa attention.backend=flash",
        "subject=layers precision=fp32 attention=sdpa",
        "subject=layers workload.batch_size=2 workload=masked attention=sdpa",
        "subject=ops",
        "subject=ops subject.kind=gemms precision=fp32",
        "subject=ops subject.kind=transformer subject.count=1 attention=sdpa",
    ],
)
def test_right_parts_are_found_right(words: str):
    made = part_of("model=tiny", *words.split())
    instance = built(made)
    assert instance.verdict.wrong == []
    assert 0 < instance.verdict.metrics["error/rel_l2"] < 0.05
    instance.call(5)
    instance.call_host(5)
    assert instance.recheck() == []


def scaled_attend(q, k, v, mask, scale):
    return eager_attend(q, k, v, mask, 1.3 * scale)


def almost_attend(q, k, v, mask, scale):
    return eager_attend(q, k, v, mask, scale) * (1 + 2**-7)


@dataclass(frozen=True)
class Wrong(Option):
    """Attention with another scale, said to be the same maths."""

    numerics = Numerics.REORDERED

    def apply(self, policy: Policy) -> None:
        policy.fill(Attention, "attend", scaled_attend, ("prefill",), "another scale")


@dataclass(frozen=True)
class Liar(Option):
    """Says that nothing changes."""

    def apply(self, policy: Policy) -> None:
        policy.fill(Attention, "attend", almost_attend, ("prefill",), "almost the same")


def test_wrong_layers_are_found():
    made = part_of("subject=layers", "model=tiny")
    assert "the plain model's own error" in built(made, attention=Wrong()).verdict.wrong[0]
    [first, *_] = built(made, attention=Liar()).verdict.wrong
    assert first.startswith("attention declared EXACT, but changed 4 of 4 observations' tokens")


def test_what_goes_wrong_later_is_found():
    instance = built(part_of("subject=layers", "model=tiny"))
    assert instance.recheck() == []
    instance.policy.model.paligemma.blocks[0].mlp.down.weight.mul_(0.5)
    assert instance.recheck() != []


def test_captured_layers(monkeypatch: pytest.MonkeyPatch):
    """The way of a captured call, with a graph that needs no GPU."""
    monkeypatch.setattr(capture, "Graph", PretendedGraph)
    instance = built(part_of("subject=layers", "model=tiny"), graphs=Manual())
    assert instance.verdict.wrong == []
    assert instance.counters()["graphs/captures"] == 1
    assert instance.watched(lambda stage, function: function) is None
    assert instance.launched(lambda stage, function: function) is not None


def test_layers_are_one_stage():
    stages: list[str] = []

    def watch(stage, function):
        def seen(*args):
            stages.append(stage)
            return function(*args)

        return seen

    instance = built(part_of("subject=layers", "model=tiny"))
    with instance.watched(watch):
        instance.call(0)
    assert stages == ["prefill"]
    assert instance.launched(watch) is None


# ---- refused


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("image_masking=skip", "image_masking: a part has no cameras"),
        ("fusion.rewrites.fold_norms=true", "fusion.rewrites.fold_norms: is about the whole policy"),
        ("attention.denoise=sdpa", "attention.denoise: a part has no stages; choose attention itself"),
    ],
)
def test_what_concerns_the_whole_policy_is_unsupported(words: str, cause: str):
    assert part_of("subject=layers", "model=tiny", words).unmet(H200) == [cause]
    assert part_of("subject=layers", "model=tiny", "fusion=kernels", "attention=triton").unmet(H200) == []


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (
            "subject.kind=gemms attention=sdpa",
            "attention: scaled_dot_product_attention(auto) finds no Attention.attend",
        ),
        ("subject.kind=gemms fusion.qkv=true", "fusion: one matrix for q, k and v finds no GemmaAttention.project"),
        ("precision=fp8", "precision: float8 weights, torch._scaled_mm finds no Linear.matmul to fill in element-wise"),
    ],
)
def test_an_option_without_anything_to_fill_is_refused(words: str, cause: str):
    with pytest.raises(UnsupportedError) as told:
        built(part_of("subject=ops", "model=tiny", *words.split()))
    assert str(told.value).startswith(cause)


@dataclass(frozen=True)
class ElsewhereOnly(Option):
    def apply(self, policy: Policy) -> None:
        policy.fill(Attention, "attend", eager_attend, ("vision",), "for pictures")


def test_an_option_of_another_stage_alone_is_refused():
    with pytest.raises(UnsupportedError, match="attention: for pictures changes nothing in 4 layers"):
        built(part_of("subject=layers", "model=tiny"), attention=ElsewhereOnly())


def test_all_kernels_find_their_slots_in_layers():
    """On the meta device: Triton itself needs a GPU."""
    made = part_of("subject=layers", "model=tiny")
    assert isinstance(made, LayersSubject)
    policy = made.part(FP32, torch.device("meta"))
    policy.begin("fusion")
    Fusion(qkv=True, gate_up=True, norms=True, activation=True, rope=True).apply(policy)
    policy.settle()
    lines = "\n".join(policy.applied["fusion"])
    for words in (
        "9 RMSNorm.normalize",
        "4 GatedMlp.activate",
        "4 GemmaAttention.project -> Triton",
        "Pi0.empty_cache",
    ):
        assert words in lines
    assert "vision" not in lines


def test_a_checkpoint_with_fewer_layers_is_refused():
    made = part_of("subject=ops", "subject.kind=transformer", "subject.count=9", "model=tiny")
    assert isinstance(made, OpsSubject)
    weights = replace(made.whole.weights, checkpoint="somewhere")
    with pytest.raises(UserError, match=r"subject\.depth is 9; the checkpoint has 3 layers"):
        _ = replace(made, whole=replace(made.whole, weights=weights)).layers


def test_reasons_name_what_is_compared():
    made = verify.judge([torch.ones(1, 2) * torch.nan], [torch.ones(1, 2)], [torch.ones(1, 2)], Numerics.EXACT, "bf16",
                        of="tokens")  # fmt: skip
    assert made.wrong == ["the tokens are not finite"]
