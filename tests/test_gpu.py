"""What only a GPU can show, on models of full width with two layers a stage."""

import dataclasses

import pytest
import torch
from helpers import plain_config

from pi0exp import subject
from pi0exp.model.config import CAMERAS
from pi0exp.policy_subject import PolicySubject, run
from pi0exp.verify import rel_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none"),
]

SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")


def shallow(*overrides: str) -> PolicySubject:
    made = subject.subject(plain_config(*SHALLOW, *overrides))
    assert isinstance(made, PolicySubject)
    return made


def built(*overrides: str):
    return shallow(*overrides).build(torch.device("cuda", 0), 8, lambda text: None)


@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize(
    "stack",
    [
        ["graphs=manual"],
        ["attention=sdpa"],
        ["attention=sdpa", "attention.denoise=eager", "graphs=manual"],
        ["attention=sdpa", "graphs=manual", "image_masking=skip"],
        ["attention=sdpa", "graphs=manual", "image_masking=skip", "workload.batch_size=3"],
        ["precision=fp32", "graphs=manual"],
    ],
    ids=" ".join,
)
def test_stack_computes_the_same_actions(model, stack):
    instance = built(f"model={model}", *stack)
    assert instance.verdict.wrong == []


def test_compiled_and_captured():
    instance = built("compile_mode=default", "graphs=manual", "attention=sdpa")
    assert instance.verdict.wrong == []
    assert instance.counters()["compile/breaks"] == 0


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn", "math"])
def test_sdpa_backend_runs_without_masks(backend):
    """One structure without anything to mask: a named backend that cannot take masks is an error elsewhere."""
    made = shallow(f"attention.backend={backend}", "attention=sdpa")
    device = torch.device("cuda", 0)
    inputs = made.on_device(made.inputs(2).items, device)
    plain = run(made.plain_policy(made.precision.model, device), inputs)
    truth = run(made.plain_policy(made.precision.truth, device), inputs)
    found = run(made.policy(device), inputs)
    for a, b, c in zip(found, plain, truth, strict=True):
        assert rel_l2(a, c)[0] <= 2 * rel_l2(b, c)[0]


def test_flash_with_a_mask_is_an_error():
    made = shallow("attention=sdpa", "attention.backend=flash", "workload=masked")
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="No available kernel"):
        run(made.policy(device), made.on_device(made.inputs(1).items, device))


def test_graph_follows_observations_of_any_structure():
    """Other cameras, prompt lengths and batch sizes, in any order and with evictions: never the wrong graph."""
    device = torch.device("cuda", 0)
    made = shallow("graphs=manual", "graphs.max_graphs=2", "attention=sdpa", "image_masking=skip")
    policy = made.policy(device)
    direct = dataclasses.replace(made, stack=shallow("attention=sdpa", "image_masking=skip").stack).policy(device)
    given = []
    for batch, cameras, length in ((1, 3, 20), (2, 2, 20), (1, 1, 7), (1, 3, 12), (3, 3, 20), (1, 3, 20)):
        present = str([i < cameras for i in range(len(CAMERAS))]).lower()
        other = shallow(
            f"workload.batch_size={batch}", f"workload.cameras_present={present}", f"workload.prompt_tokens={length}"
        )
        given += other.on_device(other.inputs(2).items, device)
    given += given[::-1]
    for a, b in zip(run(policy, given), run(direct, given), strict=True):
        assert torch.equal(a, b)
    counters = policy.counters()
    assert counters["graphs/kept"] == 2
    assert counters["graphs/captures"] == counters["graphs/evictions"] + 2 >= 5


def test_actions_are_not_overwritten_by_the_next_call():
    device = torch.device("cuda", 0)
    made = shallow("graphs=manual")
    policy = made.policy(device)
    first, second = made.on_device(made.inputs(2).items, device)
    held = policy.sample_actions(*first)
    kept = held.clone()
    policy.sample_actions(*second)
    assert torch.equal(held, kept)


def test_nothing_waits_for_the_device_in_a_call():
    """A synchronisation or a copy from the host inside a call raises in this mode."""
    device = torch.device("cuda", 0)
    for model in ("pi0", "pi05"):
        made = shallow(f"model={model}", "workload=masked")
        policy = made.policy(device)
        given = made.on_device(made.inputs(1).items, device)[0]
        policy.sample_actions(*given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            policy.sample_actions(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_full_size_model_is_in_memory_once():
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    made = subject.subject(plain_config())
    policy = made.plain_policy(made.precision.model, device)
    size = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    # Beside the model only the largest parameter, as float32 and as it is held.
    largest = max(p.numel() for p in policy.model.parameters())
    assert torch.cuda.max_memory_allocated() <= size + 10 * largest
