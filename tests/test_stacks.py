"""The named stacks: which compute the same actions, and that they run where they can."""

import pytest
import torch
from helpers import GROUPS_OF, plain_config

from pi0exp import build, config, subject
from pi0exp.image_masking.ignore import Ignore
from pi0exp.machine import Machine, this_machine
from pi0exp.option import Numerics

STACKS = GROUPS_OF["stack"]
DROPS_MASKS = "fork_best"
SHALLOW = ("model.vision.depth=2", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096")
VENDOR = {
    "mi350_best": "amd",
    "h200_best": "nvidia",
    "10_persistent": "nvidia",
    "11_hopper": "nvidia",
    "12_tuned": "nvidia",
    "library_tuned": "nvidia",
}


def of_what(name: str) -> list[str]:
    """The stack's own word, and what it is for if that is not the policy."""
    return [f"stack={name}", *(["subject=layers"] if name.startswith("layers_") else [])]


def stack_of(name: str) -> config.Stack:
    return config.stack(plain_config(f"stack={name}"))


@pytest.mark.parametrize("name", STACKS)
def test_only_the_one_that_says_so_computes_other_actions(name: str):
    stack = stack_of(name)
    assert (build.numerics(stack) is Numerics.APPROXIMATE) == (name == DROPS_MASKS)
    assert isinstance(stack.image_masking, Ignore) == (name == DROPS_MASKS)


def test_published_stack_has_a_twin_that_honours_masks():
    honest, published = stack_of(f"{DROPS_MASKS}_masked"), stack_of(DROPS_MASKS)
    differing = [group for group, option in honest.options() if getattr(published, group) != option]
    assert differing == ["image_masking"]


@pytest.mark.parametrize("name", STACKS)
def test_no_stack_excludes_itself(name: str):
    """On a GPU of each kind that it is for, nothing but packages may be missing."""
    machines = {
        "nvidia": Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90"),
        "amd": Machine(gpu="AMD Instinct MI350X", vendor="amd", arch="gfx950"),
    }
    for vendor, machine in machines.items():
        if VENDOR.get(name, vendor) == vendor:
            reasons = build.unmet(stack_of(name), machine)
            assert [reason for reason in reasons if "not installed" not in reason] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
@pytest.mark.parametrize("workload", ["default", "masked"])
@pytest.mark.parametrize("model", ["pi0", "pi05"])
@pytest.mark.parametrize("name", STACKS)
def test_on_this_gpu(name: str, model: str, workload: str):
    """Also the first thing to run on a GPU of a kind that none was at hand of while the stack was written."""
    made = subject.subject(plain_config(*of_what(name), f"model={model}", f"workload={workload}", *SHALLOW))
    if reasons := made.unmet(this_machine()):
        pytest.skip("; ".join(reasons))
    if stack_of(name).compile_mode.__class__.__name__.startswith("MaxAutotune"):
        pytest.skip("autotuning takes minutes: python -m pi0exp stack=openpi_default")
    assert made.build(torch.device("cuda", 0), 8, lambda text: None).verdict.wrong == []
