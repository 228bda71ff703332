"""A part of the policy that stands for itself: options change it through the same slots as the whole policy.

An option speaks to all stages of a policy. A part has some of them, and what an option does to the others is left out.
An option of which nothing is left is refused, and so is one that wants something of a stage that is not in the part.

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pi0exp.errors import UnsupportedError
from pi0exp.model.gemma import GemmaBlock
from pi0exp.policy import Policy, Prepare


@dataclass(frozen=True, eq=False)
class Given:
    """What a call is given beside its input, in the form in which options know an observation.

    valid_BT: bool, which tokens are real (here all of them); None for parts that do not ask.
    """

    valid_BT: Tensor | None = None

    @property
    def structure(self) -> tuple[int, ...]:
        """What graphs are kept by, together with the shape of the input."""
        return () if self.valid_BT is None else tuple(self.valid_BT.shape)

    def tensors(self) -> list[Tensor]:
        return [] if self.valid_BT is None else [self.valid_BT]

    def with_tensors(self, tensors: list[Tensor]) -> "Given":
        return replace(self, valid_BT=tensors[0]) if tensors else self


@dataclass
class PartPolicy(Policy):
    """model: called as model(given, x). what: the part in words, plural. on: its device.

    present: stage -> its modules. slots: slots of the model itself that there are. missed: group -> what an option had
    for stages that are not there. Whatever cannot be done raises UnsupportedError.
    """

    model: Any
    what: str = ""
    on: torch.device = field(default_factory=lambda: torch.device("cpu"))
    present: Mapping[str, list[nn.Module]] = field(default_factory=dict)
    slots: tuple[str, ...] = ()
    missed: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.on

    @torch.inference_mode()
    def compute(self, given: Given, x: Tensor) -> Tensor:
        """What comes of an input."""
        call: Callable[[Any, Tensor], Tensor] = self._call or self.plain_call
        return call(given, x)

    def plain_call(self, given: Any, x: Tensor) -> Tensor:
        made: Tensor = self.model(given, x)
        return made

    def settle(self) -> None:
        """Once all options are applied: refuses those of which nothing was left."""
        for group, what in self.missed.items():
            if group not in self.applied:
                raise self._refused(f"{what} changes nothing in {self.what}", group)

    def _refused(self, why: str, group: str = "") -> UnsupportedError:
        return UnsupportedError(f"{group or self._group}: {why}")

    # ---- how options change it

    @property
    def stage_methods(self) -> Mapping[str, tuple[str, ...]]:
        return {stage: (stage,) for stage in self.present if hasattr(self.model, stage)}

    def stage_modules(self, stage: str) -> list[nn.Module]:
        return list(self.present.get(stage, []))

    def blocks(self, stage: str) -> list[Any]:
        return self.instances(GemmaBlock, stage)

    def fill_each(
        self,
        kind: type[nn.Module],
        slot: str,
        factory: Callable[[Any], Any],
        stages: tuple[str, ...],
        what: str,
    ) -> None:
        there = tuple(stage for stage in stages if stage in self.present)
        if not there:
            self.missed.setdefault(self._group, what)
            return
        for stage in there:
            if not self.instances(kind, stage):
                raise self._refused(f"{what} finds no {kind.__name__}.{slot} to fill in {self.what}")
        super().fill_each(kind, slot, factory, there, what)

    def fill_model(self, slot: str, function: Any, what: str) -> None:
        if slot not in self.slots:
            raise self._refused(f"{self.what} have no Pi0.{slot} to fill ({what})")
        super().fill_model(slot, function, what)

    def wrap_stage(self, stage: str, wrapper: Callable[[Any], Any], what: str) -> None:
        if stage not in self.present:
            self.missed.setdefault(self._group, what)
            return
        if stage not in self.stage_methods:
            raise self._refused(f"{self.what} have no function of a stage for {what}")
        super().wrap_stage(stage, wrapper, what)

    def wrap_blocks(self, stage: str, wrapper: Callable[[Any], Any], what: str) -> None:
        if stage not in self.present:
            self.missed.setdefault(self._group, what)
            return
        if not self.blocks(stage):
            raise self._refused(f"{self.what} have no transformer blocks for {what}")
        super().wrap_blocks(stage, wrapper, what)

    def prepare_with(self, prepare: Prepare, what: str) -> None:
        raise self._refused(f"{self.what} take no observation ({what})")
