"""An option that breaks the measurement of a policy on a GPU, each fault a real one, and each once.

graphs._target_=gpu_fault_options.GpuFaulty +graphs.fault=gpu_oom +graphs.marks=FOLDER
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fault_options import TIMED_CALL, Faulty, at_call, no_fault

from pi0exp.policy import Policy

FOREVER = 10**15
"""Clock cycles of the GPU: days."""


@dataclass(frozen=True)
class GpuFaulty(Faulty):
    @property
    def known(self) -> dict[str, Callable[[Policy], None]]:
        return FAULTS


def gpu_oom(policy: Policy) -> None:
    """Takes memory until there is none."""
    blocks = []
    while True:
        blocks.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))


def gpu_assert(policy: Policy) -> None:
    """A kernel of PyTorch that looks at its index finds it out of bounds."""
    index = torch.tensor([7], device="cuda")
    torch.zeros(3, device="cuda")[index].sum().item()


@triton.jit
def wild_store(pointer):
    tl.store(pointer + (1 << 40), 1.0)


def gpu_illegal(policy: Policy) -> None:
    """A timed call writes far beyond its tensor. The launch succeeds; whoever waits for the device is told."""

    def store(actions: torch.Tensor) -> torch.Tensor:
        wild_store[(1,)](torch.zeros(1, device="cuda"))
        return actions

    at_call(policy, TIMED_CALL, store)


def gpu_hang(policy: Policy) -> None:
    """A kernel that does not end, and a host that waits for it."""
    torch.cuda._sleep(FOREVER)
    torch.cuda.synchronize()


FAULTS: dict[str, Callable[[Policy], None]] = {
    "none": no_fault,
    **{fault.__name__: fault for fault in (gpu_oom, gpu_assert, gpu_illegal, gpu_hang)},
}
