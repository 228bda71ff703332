"""What is measured: something that can be built, verified and called. The frame knows nothing else of it.

The policy is one subject; single layers, kernels and matrix products are others. `conf/config.yaml` names the class in
`subject._target_`; it reads from the composed configuration what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from pi0exp.errors import UserError
from pi0exp.option import Numerics

if TYPE_CHECKING:
    import torch

    from pi0exp.config import MeasureConfig
    from pi0exp.machine import Machine
    from pi0exp.roofline import Ceilings

Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]
Progress = Callable[[str], None]
"""Told in a few words what is being done."""


@dataclass(frozen=True)
class StageWork:
    """The least that a stage must do: `count` times `flops` operations and `bytes_moved` bytes of device memory."""

    name: str
    flops: float
    bytes_moved: float
    count: int = 1


@dataclass(frozen=True)
class Verdict:
    """Whether it still computes the same. wrong: one sentence for each way in which it does not. metrics: errors."""

    wrong: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class Instance(Protocol):
    """A built and verified subject."""

    @property
    def verdict(self) -> Verdict: ...
    @property
    def applied(self) -> dict[str, list[str]]: ...
    @property
    def facts(self) -> dict[str, str]:
        """What one must know to read the numbers, e.g. tokens=stand-in."""
        ...

    @property
    def startup_s(self) -> dict[str, float]:
        """Seconds of building and of first calls (compilation, capture)."""
        ...

    @property
    def samples_per_call(self) -> int:
        """How many samples one call computes (the batch size)."""
        ...

    def call(self, index: int) -> None:
        """One call on device-resident input `index` (it wraps around); may return before the device is done."""
        ...

    def call_host(self, index: int) -> None:
        """The same from host arrays to host arrays; returns when the result is there."""
        ...

    def watched(self, watch: Watch) -> AbstractContextManager[None] | None:
        """Meanwhile each function that computes a part of a stage is `watch(stage, function)`.

        None where calls do not pass through such functions: one graph for the whole call, or no stages at all.
        """
        ...

    def launched(self, watch: Watch) -> AbstractContextManager[None] | None:
        """Meanwhile calls launch one by one the kernels that they otherwise replay from graphs, watched as above.

        None where they replay no graphs, or only such as cannot be bypassed.
        """
        ...

    def recheck(self) -> list[str]:
        """After all calls: one sentence for each way in which it no longer computes the same."""
        ...

    def counters(self) -> dict[str, float]: ...
    def attachments(self) -> dict[str, str]:
        """File name -> text that is kept with the result."""
        ...


@dataclass
class Details:
    """Times beside those of the whole call. metrics: named case..., see `pi0exp.result.TIMED`; samples: every one."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Detailed(Protocol):
    """An instance whose parts are timed one by one, in a pass of their own."""

    def details(self, settings: MeasureConfig, ceilings: Ceilings | None, progress: Progress) -> Details:
        """ceilings: in short bursts; None where the machine has none."""
        ...


class Subject(Protocol):
    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """Type the parts of the configuration that this subject reads. Raises UserError."""
        ...

    @property
    def numerics(self) -> Numerics: ...

    def params(self) -> dict[str, str]:
        """The settings that tell its runs apart, by their names: workload.batch_size -> 1."""
        ...

    def preflight(self) -> None:
        """Read whatever input can be wrong, before anything expensive. Raises UserError."""
        ...

    def files(self) -> dict[str, Path]:
        """Files that it computes from, by the setting that names each: their content is part of the point. Raises
        UserError."""
        ...

    def unmet(self, machine: Machine) -> list[str]:
        """Why this cannot run on that machine or in that combination; empty if it can."""
        ...

    def environment(self) -> dict[str, str]:
        """Variables that must be set in the measuring process before anything is built."""
        ...

    def proofs(self) -> list[tuple[str, str]]:
        """(what, regular expression): some kernel or runtime call of a GPU profile must match each."""
        ...

    def work(self) -> list[StageWork]:
        """The least work of one call, stage by stage."""
        ...

    def stack_work(self) -> list[StageWork]:
        """What this stack's structure makes of it, stage by stage; the same as `work` where nothing more is known."""
        ...

    def matrix_rate(self) -> str:
        """Which rate of the machine bounds its matrix products: a name in `pi0exp.rates.RATES`."""
        ...

    def build(self, device: torch.device, inputs: int, progress: Progress) -> Instance:
        """Build it, verify it, and keep `inputs` different inputs on the device."""
        ...


def subject(plain: dict[str, Any]) -> Subject:
    """The subject that the configuration names, typed."""
    node = plain.get("subject")
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"subject is {node!r}; its _target_ must name a class")
    target = str(node["_target_"])
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"subject: _target_ {target!r} cannot be loaded: {error}") from error
    if not hasattr(cls, "from_plain"):
        raise UserError(f"subject: _target_ {target!r} is not a Subject")
    made: Subject = cls.from_plain(plain)
    return made
