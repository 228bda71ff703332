"""The policy as a subject: model, weights, workload and stack, built, verified and callable."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pi0exp import build, config, roofline, stack_work, truths, verify
from pi0exp.checked import apply_checked
from pi0exp.graphs.capture import Capture, launched_one_by_one
from pi0exp.machine import Machine, this_machine
from pi0exp.model.checkpoint import Checkpoint, find_checkpoint
from pi0exp.model.config import ModelConfig
from pi0exp.model.names import parameter_shapes
from pi0exp.model.observation import Observation
from pi0exp.model.precision import Precision
from pi0exp.model.weights import Source, checkpoint_source, random_source
from pi0exp.model.weights import build as build_model
from pi0exp.option import Numerics
from pi0exp.policy import Policy, Watch
from pi0exp.precision.option import PrecisionOption, allow_tf32
from pi0exp.preprocess import Normalization, load_normalization, statistics_files
from pi0exp.recording import find_observations
from pi0exp.subject import Progress, StageWork, Verdict
from pi0exp.workload import KINDS, HostInput, Inputs, Workload, host_inputs, verification_inputs

_FLOAT64_LIMIT = 100_000_000
"""Parameters up to which the truth of fp32 is taken in float64; beyond it memory and time do not pay."""

DeviceInput = tuple[Observation, Tensor]


@dataclass(frozen=True)
class PolicySubject:
    """Pi0 with a stack on a workload. `from_plain` types the sections model, workload and the option groups."""

    dimensions: ModelConfig
    weights: config.Weights
    workload: Workload
    stack: config.Stack
    observations: int = 8
    reuse_truth: bool = False

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        dimensions, weights = config.model(plain)
        measure = config.measure(plain) if "measure" in plain else None
        observations = measure.observations if measure else cls.observations
        reuse = measure.reuse_truth if measure else cls.reuse_truth
        return cls(dimensions, weights, config.workload(plain), config.stack(plain), observations, reuse)

    def params(self) -> dict[str, str]:
        given = {name: value for name, value in vars(self.workload).items() if name != "name" and value is not None}
        params = {f"workload.{name}": str(value) for name, value in given.items()}
        params["workload.cameras_present"] = "".join(str(int(there)) for there in self.workload.cameras_present)
        if self.weights.checkpoint is not None:
            params["model.checkpoint"] = self.weights.checkpoint
        return params

    @property
    def precision(self) -> PrecisionOption:
        assert isinstance(self.stack.precision, PrecisionOption)
        return self.stack.precision

    @property
    def numerics(self) -> Numerics:
        return build.numerics(self.stack)

    def unmet(self, machine: Machine) -> list[str]:
        return build.unmet(self.stack, machine)

    def environment(self) -> dict[str, str]:
        return build.environment(self.stack)

    def proofs(self) -> list[tuple[str, str]]:
        return build.proofs(self.stack)

    def matrix_rate(self) -> str:
        return self.precision.products()

    def preflight(self) -> None:
        _ = self.checkpoint  # opening it checks it
        self.inputs(1)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The opened and checked checkpoint; None for random weights."""
        if self.weights.checkpoint is None:
            return None
        checkpoint = Checkpoint(find_checkpoint(self.weights.checkpoint))
        checkpoint.check(self.dimensions)
        return checkpoint

    @cached_property
    def normalization(self) -> Normalization:
        directory = None if self.checkpoint is None else self.checkpoint.directory
        return load_normalization(directory, self.dimensions.pi05)

    def files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        if self.checkpoint is not None:
            found["model.checkpoint"] = self.checkpoint.file
            for file in statistics_files(self.checkpoint.directory):
                found[f"model.checkpoint {file.relative_to(self.checkpoint.directory).as_posix()}"] = file
        if self.workload.observations is not None:
            found["workload.observations"] = find_observations(self.workload.observations)
        if self.workload.tokenizer is not None:
            found["workload.tokenizer"] = Path(self.workload.tokenizer)
        return found

    def inputs(self, count: int) -> Inputs:
        return host_inputs(self.workload, self.dimensions, self.normalization, count)

    def work(self) -> list[StageWork]:
        item = self.inputs(1).items[0]
        lengths = [int(length) for length in item.token_mask.sum(axis=1)]
        cameras, workload = sum(self.workload.cameras_present), self.workload
        size = roofline.VALUE_BYTES[self.matrix_rate()]
        return roofline.policy_work(self.dimensions, cameras, lengths, workload.horizon, workload.num_steps, size)

    def stack_work(self) -> list[StageWork]:
        item, workload = self.inputs(1).items[0], self.workload
        lengths = [int(length) for length in item.token_mask.sum(axis=1)]
        pi05, present, padded = self.dimensions.pi05, workload.cameras_present, item.token_mask.shape[1]
        done = stack_work.computed(self.stack, pi05, present, lengths, padded)
        size = roofline.VALUE_BYTES[self.matrix_rate()]
        return stack_work.stack_work(self.dimensions, done, workload.horizon, workload.num_steps, size)

    def source(self, device: torch.device) -> Source:
        if self.checkpoint is not None:
            return checkpoint_source(self.checkpoint, device)
        return random_source(self.dimensions, self.weights.seed, device)

    def plain_policy(self, precision: Precision, device: torch.device) -> Policy:
        """The model as it is written, in any precision, with this subject's weights."""
        model = build_model(self.dimensions, precision, self.source(device), device)
        return Policy(model, self.workload.horizon, self.workload.num_steps)

    def without_numbers(self) -> Policy:
        """The plain policy at full size in no memory, on torch's meta device."""

        def empty(name: str, shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, device="meta")

        model = build_model(self.dimensions, self.precision.model, empty, "meta")
        return Policy(model, self.workload.horizon, self.workload.num_steps)

    def on_device(self, items: Sequence[HostInput], device: torch.device) -> list[DeviceInput]:
        return [(item.observation(self.dimensions, device), torch.from_numpy(item.noise).to(device)) for item in items]

    def policy(self, device: torch.device) -> Policy:
        """The policy with the whole stack applied, as it is measured."""
        allow_tf32(self.precision.tf32)
        policy = self.plain_policy(self.precision.model, device)
        for _ in build.apply_stack(policy, self.stack):
            pass
        return policy

    def build(self, device: torch.device, inputs: int, progress: Progress) -> PolicyInstance:
        given = verification_inputs(self.workload, self.dimensions, self.normalization, self.observations)
        checks = self.on_device(given, device)
        progress("verify: truth")
        truth, of_truth = self.truth_of(given, checks, device)

        progress("build")
        startup_s = {"build": 0.0, "first_call": 0.0}
        start = time.perf_counter()
        policy = self.plain_policy(self.precision.model, device)
        synchronize(device)
        startup_s["build"] += time.perf_counter() - start

        progress("verify: plain model")
        allow_tf32(self.precision.tf32)
        plain = run(policy, checks)
        done = apply_checked(policy, self.stack, lambda few: run(policy, checks[:few]), plain, progress)
        startup_s["build"] += done.build_s
        startup_s["first_call"] = done.first_call_s
        bound = build.bound(self.stack)
        judge = partial(
            verify.judge,
            plain=plain,
            truth=truth,
            numerics=self.numerics,
            precision=self.precision.model.name,
            bound=bound,
            kinds=KINDS,
        )
        failures = [*done.failures, *self.from_host(policy, given, done.found)]
        verdict = judge(done.found, exact_failures=failures)

        def again() -> Verdict:
            found = run(policy, checks)
            return judge(found, exact_failures=self.from_host(policy, given, found))

        made = self.inputs(inputs)
        facts = made.facts | {"weights": "random" if self.checkpoint is None else "checkpoint", "truth": of_truth}
        resident = self.on_device(made.items, device)
        return PolicyInstance(self, policy, verdict, startup_s, facts, made.items, resident, again)

    def from_host(self, policy: Policy, given: Sequence[HostInput], found: Sequence[Tensor]) -> list[str]:
        """How the way of its own that a stack has from host to host changes the actions; [] without one, and if not."""
        if not policy.staged:
            return []
        difference = verify.unequal(found, [self.act(policy, item) for item in given])
        return [f"the call from host to host {difference}"] if difference else []

    def act(self, policy: Policy, item: HostInput) -> Tensor:
        """Host arrays to actions on the host, float32 [B, horizon, A]."""
        return policy.act(item.observation(self.dimensions, "cpu"), torch.from_numpy(item.noise))

    def truth_of(
        self, given: Sequence[HostInput], checks: Sequence[DeviceInput], device: torch.device
    ) -> tuple[list[Tensor], str]:
        """The truth, and when it was computed. Kept only on a GPU, where it takes time, and for weights from a seed."""
        if not self.reuse_truth or device.type == "cpu" or self.checkpoint is not None:
            return self.truth(checks, device), "computed in this run"
        what = self.dimensions, self.weights.seed, self.precision, self.workload.horizon, self.workload.num_steps
        key = truths.key_of(this_machine(), what, given)
        return truths.kept(truths.TruthFolder.default(), key, lambda: self.truth(checks, device))

    def truth(self, checks: Sequence[DeviceInput], device: torch.device) -> list[Tensor]:
        """The actions that all others are judged by; the model that computes them is gone afterwards."""
        parameters = sum(math.prod(shape) for shape in parameter_shapes(self.dimensions).values())
        allow_tf32(False)
        policy = self.plain_policy(truth_precision(self.precision, parameters), device)
        actions = run(policy, checks)
        del policy
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return actions


def truth_precision(option: PrecisionOption, parameters: int) -> Precision:
    """The precision of the truth for a model of so many parameters."""
    too_large = option.truth.activations is torch.float64 and parameters > _FLOAT64_LIMIT
    return option.model if too_large else option.truth


def run(policy: Policy, inputs: Sequence[DeviceInput]) -> list[Tensor]:
    """Actions for every input, on the host."""
    return [policy.sample_actions(observation, noise_BCA).cpu() for observation, noise_BCA in inputs]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class PolicyInstance:
    """A built and verified policy with inputs to rotate through.

    verify_again: the verdict over the same observations once more.
    """

    subject: PolicySubject
    policy: Policy
    verdict: Verdict
    startup_s: dict[str, float]
    facts: dict[str, str]
    host_items: list[HostInput]
    device_items: list[DeviceInput] = field(default_factory=list)
    verify_again: Callable[[], Verdict] = Verdict

    @property
    def applied(self) -> dict[str, list[str]]:
        return self.policy.applied

    @property
    def samples_per_call(self) -> int:
        return self.subject.workload.batch_size

    def counters(self) -> dict[str, float]:
        return self.policy.counters()

    def attachments(self) -> dict[str, str]:
        return self.policy.attachments()

    def watched(self, watch: Watch) -> AbstractContextManager[None] | None:
        return self.policy.watched(watch) if self.policy.stages_apart else None

    def launched(self, watch: Watch) -> AbstractContextManager[None] | None:
        if not isinstance(self.subject.stack.graphs, Capture):
            return None
        return launched_one_by_one(self.policy.watched(watch))

    def recheck(self) -> list[str]:
        return self.verify_again().wrong

    def call(self, index: int) -> None:
        self.policy.sample_actions(*self.device_items[index % len(self.device_items)])

    def call_host(self, index: int) -> None:
        self.subject.act(self.policy, self.host_items[index % len(self.host_items)])
