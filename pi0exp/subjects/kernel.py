"""One Triton kernel of `kernels/` at the policy's shapes, beside its reference, torch.compile of it and libraries.

The bench of the kernels checks and times; see `pi0exp.kernels.bench`. A call of the whole is the op on each of its
cases once, in one graph.
"""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any, Self

import torch

from pi0exp import config, verify
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.option import ANY_GPU, Numerics
from pi0exp.policy import Watch
from pi0exp.roofline import Ceilings
from pi0exp.subject import Details, Progress, StageWork, Verdict
from pi0exp.subjects.plain import foreign
from pi0exp.subjects.product_times import rounds

if TYPE_CHECKING:
    from pi0exp.kernels.bench import Row
    from pi0exp.kernels.kernel import Case, Kernel


@dataclass(frozen=True)
class KernelConfig:
    """`subject.` of kernel. op: its name. compiled: whether torch.compile of the reference takes part.

    replay_us: how long a contestant runs for one sample, about.
    """

    op: str = "rms_norm"
    compiled: bool = True
    replay_us: float = 1000.0

    def __post_init__(self) -> None:
        if not self.replay_us > 0:
            raise ValueError(f"replay_us is {self.replay_us}; it must be above 0")


@dataclass(frozen=True)
class KernelSubject:
    """The op `config.op` on those of its cases that are shapes of the policy. Model and workload say nothing here."""

    config: KernelConfig

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        if reasons := foreign(config.stack(plain), (), "kernel", plain["names"]):
            raise UserError(reasons[0])
        return cls(config.subject_settings(plain, KernelConfig))

    @cached_property
    def kernel(self) -> "Kernel":
        from pi0exp.kernels.kernel import discover

        known = discover()
        if self.config.op not in known:
            raise UserError(f"subject.op is {self.config.op!r}; choose one of {', '.join(known)}")
        return known[self.config.op]

    @property
    def cases(self) -> list["Case"]:
        return [case for case in self.kernel.cases if case.pi0]

    @property
    def numerics(self) -> Numerics:
        return Numerics.REORDERED

    def params(self) -> dict[str, str]:
        return {"subject.op": self.config.op}

    def preflight(self) -> None:
        _ = self.kernel

    def unmet(self, machine: Machine) -> list[str]:
        why = "; Triton's interpreter computes on a CPU, but is no kernel that could be timed"
        return [f"subject.op={self.config.op} {reason}{why}" for reason in ANY_GPU.unmet(machine)]

    def environment(self) -> dict[str, str]:
        return {}

    def proofs(self) -> list[tuple[str, str]]:
        names = sorted({one.function.__name__ for one in self.kernel.ahead_of_time})
        return [(self.config.op, f"^({'|'.join(names)})")] if names else []

    def work(self) -> list[StageWork]:
        """None: many cases stay in the cache, as they do in the policy, so memory sets no limit to the whole."""
        return []

    def stack_work(self) -> list[StageWork]:
        return []

    def files(self) -> dict[str, Path]:
        return {}

    def matrix_rate(self) -> str:
        return "bf16"

    def build(self, device: torch.device, inputs: int, progress: Progress) -> "KernelInstance":
        from pi0exp.kernels.bench import captured, l2_bytes, set_count
        from pi0exp.kernels.kernel import arguments_of

        progress("verify")
        verdict = self.verdict(device)
        if verdict.wrong:
            return KernelInstance(self, verdict, device)
        progress("build")
        sets = [min(inputs, set_count(case.bytes_moved, l2_bytes(device))) for case in self.cases]
        given = [
            [arguments_of(case, device, seed) for seed in range(count)]
            for case, count in zip(self.cases, sets, strict=True)
        ]

        def each(index: int) -> None:
            for arguments in given:
                self.kernel.op(*arguments[index % len(arguments)])

        graphs = [captured(each, [(index,)], 1, device) for index in range(inputs)]
        return KernelInstance(self, verdict, device, graphs, given)

    def verdict(self, device: torch.device) -> Verdict:
        """The op on every case of the policy against the reference in float64, by the rule of the kernels."""
        from pi0exp.kernels.kernel import check

        found = [(case, one) for case in self.cases for one in check(self.kernel, case, device)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        floats = [one for _, one in found if one.eager_l2 > 0 or one.l2 > 0]
        metrics = {
            "error/rel_l2": verify.geometric_mean([one.l2 for one in floats]) if floats else 0.0,
            "error/rel_l2_plain_bf16": verify.geometric_mean([one.eager_l2 for one in floats]) if floats else 0.0,
        }
        return Verdict([f"{case.name}: {one.output}: {one.wrong}" for case, one in found if one.wrong], metrics)


@dataclass
class KernelInstance:
    """A checked op. graphs: one for each input, the op on every case; given: its arguments, which they do not keep."""

    subject: KernelSubject
    verdict: Verdict
    device: torch.device
    graphs: list[Any] = field(default_factory=list)
    given: list[list[tuple[Any, ...]]] = field(default_factory=list)
    applied: dict[str, list[str]] = field(default_factory=dict)
    startup_s: dict[str, float] = field(default_factory=dict)
    samples_per_call: int = 1

    @property
    def facts(self) -> dict[str, str]:
        return {"call": f"the op on each of {len(self.subject.cases)} cases, in one graph"}

    def call(self, index: int) -> None:
        self.graphs[index % len(self.graphs)].replay()

    def call_host(self, index: int) -> None:
        """There are no host arrays; it returns when the results are there."""
        self.call(index)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def watched(self, watch: Watch) -> AbstractContextManager[None] | None:
        return None

    def launched(self, watch: Watch) -> AbstractContextManager[None] | None:
        return None

    def recheck(self) -> list[str]:
        return self.subject.verdict(self.device).wrong

    def counters(self) -> dict[str, float]:
        return {}

    def attachments(self) -> dict[str, str]:
        return {}

    def details(self, settings: config.MeasureConfig, ceilings: Ceilings | None, progress: Progress) -> Details:
        """Every case, every contestant. Raises RuntimeError where a contestant fails of whom nothing is known."""
        from pi0exp.kernels.bench import Settings, measure

        assert ceilings is not None
        chosen, rows = self.subject.config, []
        how = Settings(rounds=rounds(settings), replay_us=chosen.replay_us, compiled=chosen.compiled)
        for case in self.subject.cases:
            progress(f"measure {case.name}")
            rows.append(measure(self.subject.kernel, case, self.device, how, ceilings))
        return told(rows, self.subject.cases, ceilings)


COMMON = ("eager", "compile")
"""Contestants that every kernel has; all others are libraries, whose fastest counts."""


def told(rows: list["Row"], cases: list["Case"], ceilings: Ceilings) -> Details:
    """case_us/CASE/WHO: microseconds. case_ratio/CASE/WHO: how many times longer than the op. case_share/CASE: of what
    the ceilings allow, above 1 where data stays in the cache.

    case_ratio/mean/WHO: the geometric mean over the cases that WHO was timed on; library: the fastest of each.
    """
    from pi0exp.kernels.bench import OP, least_us

    made, ratios, left_out = Details(), dict[str, list[float]](), list[str]()
    for row, case in zip(rows, cases, strict=True):
        name, op_us = slug(row.case), row.us(OP)
        times = {one.name: median(one.samples_us) for one in row.contestants if one.samples_us}
        made.samples |= {
            f"case_us/{name}/{slug(one.name)}": one.samples_us for one in row.contestants if one.samples_us
        }
        left_out += [f"{one.name} on {row.case}: {one.state}: {one.reason}" for one in row.contestants if one.reason]
        made.metrics |= {f"case_us/{name}/{slug(who)}": us for who, us in times.items()}
        if op_us is None:
            raise RuntimeError(f"{row.kernel} on {row.case} was not timed: {row.contestants[0].reason}")
        made.metrics[f"case_share/{name}"] = least_us(case, ceilings) / op_us
        others = {who: us for who, us in times.items() if who != OP}
        made.metrics |= {f"case_ratio/{name}/{slug(who)}": us / op_us for who, us in others.items()}
        libraries = [us for who, us in others.items() if who not in COMMON]
        fastest = {who: others[who] for who in COMMON if who in others} | (
            {"library": min(libraries)} if libraries else {}
        )
        for who, us in fastest.items():
            ratios.setdefault(who, []).append(us / op_us)
    made.metrics |= {f"case_ratio/mean/{who}": geometric_mean(values) for who, values in ratios.items()}
    if left_out:
        made.facts["not timed"] = "; ".join(left_out)
    return made


def slug(text: str) -> str:
    """As MLflow takes it in the name of a metric."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")
