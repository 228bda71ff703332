"""torch.compile with mode="reduce-overhead": the default's kernels in CUDA graphs that Inductor manages as trees."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from pi0exp.compile_mode.inductor import Compiled
from pi0exp.config import Stack
from pi0exp.graphs.none import NoGraph
from pi0exp.option import ANY_GPU
from pi0exp.policy import Policy

UNVERIFIED_ON_AMD = (
    "unverified on AMD: reduce-overhead was reported to be slower than eager by 14 or 65 times on an MI350 (the report"
    " says both), and to train silently wrong on an MI300X with ROCm 7.0 and torch 2.10"
)
"""Reported by a benchmark of this policy on MI350s (MI350_OPTIMIZATION_GUIDE.md of sunxxuns/openpi: "0.07x (65x
SLOWER!)") and in PyTorch's issue tracker. Both concern the graphs that Inductor manages, which max-autotune has too."""


@dataclass(frozen=True)
class ReduceOverhead(Compiled):
    """Each compiled function as a graph of its own, replayed in the order of the call.

    A graph follows the graphs that were replayed before it in the call and reads their outputs in place; the ten steps
    therefore are ten recordings.
    """

    requires = ANY_GPU
    mode: ClassVar[str] = "reduce-overhead"
    captures: ClassVar[bool] = True

    def clashes(self, stack: Stack) -> list[str]:
        if isinstance(stack.graphs, NoGraph):
            return []
        return [f"captures twice: mode {self.mode} makes CUDA graphs of its own; choose graphs=none"]

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        super().apply_to(policy, stages)
        if torch.version.hip is not None:
            policy.note(UNVERIFIED_ON_AMD)
            warnings.warn(f"compile_mode: mode {self.mode}: {UNVERIFIED_ON_AMD}", stacklevel=2)
