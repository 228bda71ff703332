"""An option: one choice of one `conf/` group. What it needs, what it does to the numbers, how it is applied.

An option is a frozen dataclass whose fields are its settings; the dataclass is both the schema of its yaml file and the
thing that is applied. A new option is one Python file and one yaml file that names its class in `_target_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pi0exp.config import Stack
    from pi0exp.machine import Machine
    from pi0exp.policy import Policy

STAGES = ("vision", "prefill", "denoise")
"""The stages of the policy. Attention and GEMM options may differ between them."""


class Numerics(Enum):
    """What an option does to the numbers, from harmless to not; `pi0exp.verify` holds it to its word."""

    EXACT = "bitwise the same"
    REORDERED = "same maths in another order or shape"
    APPROXIMATE = "other maths on purpose"

    @property
    def rank(self) -> int:
        return list(Numerics).index(self)


@dataclass(frozen=True)
class Requires:
    """What an option needs of the machine.

    vendors: of these GPU vendors one ("nvidia", "amd"), empty if it also runs on a CPU. archs: one of these
    architectures ("sm_90", "gfx950"). packages: PEP 508 requirements of importable distributions.
    """

    vendors: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def unmet(self, machine: Machine) -> list[str]:
        """Reasons why it cannot run on `machine`; none if it can."""
        reasons = []
        if self.vendors and machine.vendor not in self.vendors:
            found = machine.gpu if machine.has_gpu else "no GPU that torch can use"
            reasons.append(f"needs a GPU of {' or '.join(self.vendors)}; this machine has {found}")
        elif self.archs and machine.arch not in self.archs:
            reasons.append(
                f"needs the architecture {' or '.join(self.archs)}; this machine has {machine.gpu} ({machine.arch})"
            )
        return reasons + [reason for package in self.packages if (reason := _unmet_package(package))]


ANY_GPU = Requires(vendors=("nvidia", "amd"))
HOPPER = Requires(vendors=("nvidia",), archs=("sm_90",))
"""For kernels that were written for it: its matrix instruction, its copy engine, its cooperative launches."""


def _unmet_package(requirement: str) -> str | None:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"needs the package {requirement}, which is not installed"
    return (
        None
        if wanted.specifier.contains(found, prereleases=True)
        else f"needs the package {requirement}; {found} is installed"
    )


@dataclass(frozen=True)
class Option:
    """One choice of one group. Subclasses set the class variables and override `apply`.

    requires: what it needs of the machine. numerics: what it does to the numbers. bound: for APPROXIMATE ones the
    relative L2 error of the actions that must not be passed on any observation; None where nothing can be promised.
    """

    requires: ClassVar[Requires] = Requires()
    numerics: ClassVar[Numerics] = Numerics.EXACT
    bound: ClassVar[float | None] = None

    def apply(self, policy: Policy) -> None:
        """Change `policy` through its `fill`, `wrap_...` and `prepare_with`; the plain option does nothing."""

    @property
    def idle(self) -> bool:
        """Whether it leaves every policy as it is, as the plain option of a group does."""
        return type(self).apply is Option.apply

    def proof(self) -> str:
        """A regular expression that some GPU kernel or runtime call of a profile must match if this really ran.

        Empty where nothing can show it.
        """
        return ""

    def proofs(self) -> list[str]:
        """All such expressions, where one does not do; each must match."""
        return [pattern] if (pattern := self.proof()) else []

    def environment(self) -> dict[str, str]:
        """Variables that libraries read at their first use; the measuring process sets them before it builds."""
        return {}

    def holds(self) -> str:
        """What it sets for the whole process and not for one policy; "" if nothing."""
        return ""

    def files(self) -> list[str]:
        """Paths of the files that its settings name. What stands in them belongs to the key of a point."""
        return []

    def unmet(self, machine: Machine) -> list[str]:
        """Why it cannot run on `machine`; for options whose needs depend on their settings to extend."""
        return self.requires.unmet(machine)

    def clashes(self, stack: Stack) -> list[str]:
        """Why it cannot stand in `stack` beside what else is there; none if it can."""
        return []

    def at(self, stage: str) -> Option:
        """The option that takes effect in one of STAGES."""
        return self

    def parts(self) -> list[tuple[str, Option]]:
        """The options that take effect, with the stage they are for ("" for all)."""
        return [("", self)]


@dataclass(frozen=True)
class StagedOption(Option):
    """An option that may be another one for single stages: `attention=sdpa attention.denoise=triton`.

    vision, prefill, denoise: the option of that stage, or None for this one. Subclasses override `apply_to`.
    """

    vision: Any = None
    prefill: Any = None
    denoise: Any = None

    def apply(self, policy: Policy) -> None:
        own = [stage for stage in STAGES if self.at(stage) is self and stage not in policy.closed]
        if own:
            self.apply_to(policy, tuple(own))
        if type(self).apply_to is not StagedOption.apply_to:
            for stage in policy.closed:
                policy.note(f"{stage}: left to {policy.closed[stage]}")
        for stage in STAGES:
            if (option := getattr(self, stage)) is not None:
                option.apply_to(policy, (stage,))

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        """Change the given stages of `policy`; the plain option does nothing."""

    def at(self, stage: str) -> Option:
        own: Option | None = getattr(self, stage)
        return self if own is None else own

    @property
    def idle(self) -> bool:
        parts = [part for _, part in self.parts()]
        return all(isinstance(part, StagedOption) and type(part).apply_to is StagedOption.apply_to for part in parts)

    def parts(self) -> list[tuple[str, Option]]:
        others = [(stage, option) for stage in STAGES if (option := getattr(self, stage)) is not None]
        return others if len(others) == len(STAGES) else [("", self), *others]
