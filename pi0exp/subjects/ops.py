"""Many small operations one after the other, to show what launching them costs: see `graphs` and `compile_mode`.

Shapes: B batch, T tokens, D width.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from pi0exp.config import subject_settings
from pi0exp.model.layers import Linear
from pi0exp.model.precision import Precision
from pi0exp.model.weights import Source, fill
from pi0exp.policy_subject import PolicySubject
from pi0exp.roofline import VALUE_BYTES, StageSum
from pi0exp.subject import StageWork
from pi0exp.subjects.layers import STAGE, LayersConfig, LayersSubject
from pi0exp.subjects.measured import PartSubject
from pi0exp.subjects.part import Given, PartPolicy


class Kind(StrEnum):
    """elementwise: products and sums with a vector, in turn. gemms: square products, each with a weight of its own.
    transformer: layers of PaliGemma's decoder, as `subject=layers` has them."""

    elementwise = "elementwise"
    gemms = "gemms"
    transformer = "transformer"


COUNTS = {Kind.elementwise: 100, Kind.gemms: 50, Kind.transformer: 4}
"""Those of the published comparison, which does not say how large the operands were."""


@dataclass(frozen=True)
class OpsConfig:
    """`subject.` of ops. count: operations or layers; null: 100, 50 or 4. rows: tokens; null: as many as a denoising
    step of the workload has, and as the prefix has for a transformer."""

    kind: Kind = Kind.elementwise
    count: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more, or null")

    @property
    def number(self) -> int:
        return COUNTS[self.kind] if self.count is None else self.count


class Chain(nn.Module):
    """Operations on [B, T, D], each on what came of the one before. Vectors [D] and weights [D, D] lie in `expert`.

    The name makes the precision treat them as weights of the action expert, whose rows and width they have.
    """

    def __init__(self, kind: Kind, count: int, width: int, precision: Precision):
        super().__init__()
        self.kind, self.precision = kind, precision
        self.expert: nn.Module
        if kind is Kind.gemms:
            self.expert = nn.ModuleList(Linear(width, width, bias=False) for _ in range(count))
        else:
            self.expert = nn.ParameterList(torch.empty(width) for _ in range(count))

    def prefill(self, x_BTD: Tensor) -> Tensor:
        if self.kind is Kind.gemms:
            for linear in self.expert.children():
                x_BTD = linear(x_BTD)
            return x_BTD
        for i, vector_D in enumerate(self.expert.parameters()):
            x_BTD = x_BTD + vector_D if i % 2 else x_BTD * vector_D
        return x_BTD

    def forward(self, given: Given, x_BTD: Tensor) -> Tensor:
        made: Tensor = self.prefill(x_BTD)
        return made


def values(seed: int, device: torch.device) -> Source:
    """Weights and vectors that neither let a chain grow nor vanish; on the meta device none."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        normal = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 2:
            scaled: Tensor = normal * shape[1] ** -0.5
            return scaled
        factor = int(name.rpartition(".")[2]) % 2 == 0
        made: Tensor = 1 + 0.1 * normal if factor else normal
        return made

    return draw


@dataclass(frozen=True)
class OpsSubject(PartSubject):
    """A chain of `config.number` operations, or as many layers."""

    config: OpsConfig
    of = "results"

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(PolicySubject.from_plain(plain), subject_settings(plain, OpsConfig))

    @cached_property
    def layers(self) -> LayersSubject | None:
        """Where the chain is a transformer."""
        if self.config.kind is not Kind.transformer:
            return None
        return LayersSubject(self.whole, LayersConfig(self.config.number, self.config.rows)).checked()

    def shape(self) -> tuple[int, int, int]:
        if self.layers is not None:
            return self.layers.shape()
        dimensions, workload = self.whole.dimensions, self.whole.workload
        rows = self.config.rows or workload.horizon + dimensions.suffix_prelude
        return workload.batch_size, rows, dimensions.expert.width

    def params(self) -> dict[str, str]:
        batch, rows, _ = self.shape()
        numbers = {"subject.count": self.config.number, "subject.rows": rows, "workload.batch_size": batch}
        return {"subject.kind": str(self.config.kind)} | {name: str(value) for name, value in numbers.items()}

    def given(self, device: torch.device) -> Given:
        return Given() if self.layers is None else self.layers.given(device)

    def part(self, precision: Precision, device: torch.device) -> PartPolicy:
        if self.layers is not None:
            return self.layers.part(precision, device)
        with torch.device("meta"):
            model = Chain(self.config.kind, self.config.number, self.shape()[2], precision)
        fill(model, precision, values(self.whole.weights.seed, device))
        what = {Kind.elementwise: "element-wise operations", Kind.gemms: "matrix products"}[self.config.kind]
        return PartPolicy(model.eval(), 0, 1, what=what, on=device, present={STAGE: [model.expert]})

    def work(self) -> list[StageWork]:
        """Weights once, input and output once."""
        if self.layers is not None:
            return self.layers.work()
        (batch, rows, width), made = self.shape(), StageSum(VALUE_BYTES[self.matrix_rate()])
        if self.config.kind is Kind.gemms:
            made.gemm(batch * rows, width, width, times=self.config.number)
        else:
            made.values += self.config.number * width
        made.values += 2 * batch * rows * width
        return [made.work(STAGE)]
