"""What parts of the policy have in common as subjects: verified as the policy is, step by step, and then called.

Shapes: B batch, T tokens, D width.
"""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0exp import build, verify
from pi0exp.checked import apply_checked
from pi0exp.config import Stack
from pi0exp.fusion.fusion import Fusion
from pi0exp.graphs.capture import Capture, launched_one_by_one
from pi0exp.image_masking.keep import Keep
from pi0exp.machine import Machine
from pi0exp.model.precision import Precision
from pi0exp.option import Numerics
from pi0exp.policy import Watch
from pi0exp.policy_subject import PolicySubject, synchronize, truth_precision
from pi0exp.precision.option import allow_tf32
from pi0exp.subject import Progress, StageWork, Verdict
from pi0exp.subjects.part import Given, PartPolicy

CHECKS = 4
"""Inputs that are compared with the truth; others than those that are timed."""


@dataclass(frozen=True)
class PartSubject(ABC):
    """A part of `whole`, with the stack of `whole`.

    Subclasses say what the part is and which input it takes; `of` is what it computes, in words.
    """

    whole: PolicySubject
    of = "tokens"

    @abstractmethod
    def part(self, precision: Precision, device: torch.device) -> PartPolicy:
        """The part as the model has it, its weights held as `precision` says."""

    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """[B, T, D] of the input."""

    @abstractmethod
    def work(self) -> list[StageWork]: ...

    @abstractmethod
    def params(self) -> dict[str, str]: ...

    def given(self, device: torch.device) -> Given:
        return Given()

    @property
    def stack(self) -> Stack:
        return self.whole.stack

    @property
    def numerics(self) -> Numerics:
        return self.whole.numerics

    def preflight(self) -> None:
        self.whole.preflight()

    def unmet(self, machine: Machine) -> list[str]:
        return self.whole.unmet(machine) + self.excluded()

    def excluded(self) -> list[str]:
        """Options of the stack that are about the whole policy, and those of single stages."""
        stack = self.stack
        reasons = [] if isinstance(stack.image_masking, Keep) else ["image_masking: a part has no cameras"]
        assert isinstance(stack.fusion, Fusion)
        reasons += [f"fusion.rewrites.{name}: is about the whole policy" for name in stack.fusion.rewrites.chosen()]
        staged = [name for name, _ in stack.parts() if "." in name]
        return reasons + [f"{name}: a part has no stages; choose {name.partition('.')[0]} itself" for name in staged]

    def environment(self) -> dict[str, str]:
        return self.whole.environment()

    def proofs(self) -> list[tuple[str, str]]:
        return self.whole.proofs()

    def stack_work(self) -> list[StageWork]:
        return self.work()

    def files(self) -> dict[str, Path]:
        return {}

    def matrix_rate(self) -> str:
        return self.whole.matrix_rate()

    def host_input(self, index: int) -> np.ndarray:
        """Standard normal values, the same for the same index: float32 [B, T, D]."""
        generator = np.random.default_rng([self.whole.workload.seed, index])
        return generator.standard_normal(self.shape(), np.float32)

    def build(self, device: torch.device, inputs: int, progress: Progress) -> "PartInstance":
        option = self.whole.precision
        given = self.given(device)

        def on_device(index: int) -> Tensor:
            return torch.from_numpy(self.host_input(index)).to(device).to(option.model.activations)

        checks = [on_device(inputs + index) for index in range(CHECKS)]
        progress("verify: truth")
        allow_tf32(False)
        parameters = sum(one.numel() for one in self.part(option.model, torch.device("meta")).model.parameters())
        precision = truth_precision(option, parameters)
        true = self.part(precision, device)
        truth = run(true, given, [x.to(precision.activations) for x in checks])
        del true
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

        progress("build")
        start = time.perf_counter()
        policy = self.part(option.model, device)
        synchronize(device)
        startup_s = {"build": time.perf_counter() - start}

        progress("verify: plain model")
        allow_tf32(option.tf32)
        plain = run(policy, given, checks)
        stack = self.stack
        done = apply_checked(policy, stack, lambda few: run(policy, given, checks[:few]), plain, progress, self.of)
        policy.settle()
        startup_s = {"build": startup_s["build"] + done.build_s, "first_call": done.first_call_s}
        judge = partial(
            verify.judge,
            plain=plain,
            truth=truth,
            numerics=self.numerics,
            precision=option.model.name,
            bound=build.bound(stack),
            of=self.of,
        )
        return PartInstance(
            policy,
            judge(done.found, exact_failures=done.failures),
            startup_s,
            {"weights": "random" if self.whole.checkpoint is None else "checkpoint", "input": "random"},
            self.shape()[0],
            given,
            [self.host_input(index) for index in range(inputs)],
            [on_device(index) for index in range(inputs)],
            isinstance(stack.graphs, Capture),
            lambda: judge(run(policy, given, checks)).wrong,
        )


def run(policy: PartPolicy, given: Given, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What comes of every input, on the host."""
    return [policy.compute(given, x).cpu() for x in inputs]


@dataclass
class PartInstance:
    """A built and verified part with inputs to rotate through. verify_again: what is wrong after all calls."""

    policy: PartPolicy
    verdict: Verdict
    startup_s: dict[str, float]
    facts: dict[str, str]
    samples_per_call: int
    given: Given
    host_items: list[np.ndarray]
    device_items: list[Tensor]
    captures: bool = False
    verify_again: Callable[[], list[str]] = field(default=list)

    @property
    def applied(self) -> dict[str, list[str]]:
        return self.policy.applied

    def counters(self) -> dict[str, float]:
        return self.policy.counters()

    def attachments(self) -> dict[str, str]:
        return self.policy.attachments()

    def watched(self, watch: Watch) -> AbstractContextManager[None] | None:
        return self.policy.watched(watch) if self.policy.stages_apart and self.policy.stage_methods else None

    def launched(self, watch: Watch) -> AbstractContextManager[None] | None:
        return launched_one_by_one(self.policy.watched(watch)) if self.captures else None

    def recheck(self) -> list[str]:
        return self.verify_again()

    def call(self, index: int) -> None:
        self.policy.compute(self.given, self.device_items[index % len(self.device_items)])

    def call_host(self, index: int) -> None:
        x: Any = torch.from_numpy(self.host_items[index % len(self.host_items)]).to(self.policy.device)
        self.policy.compute(self.given, x.to(self.device_items[0].dtype)).cpu()
