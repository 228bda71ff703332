"""What a precision says: how the model holds its numbers, and what it is judged by."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pi0exp.model.precision import Precision
from pi0exp.option import Option
from pi0exp.policy import Policy


@dataclass(frozen=True)
class PrecisionOption(Option):
    """A precision of the plain model.

    tf32: float32 matrix products and convolutions may round their inputs to TF32. It is a switch of the whole process.
    The original turns it on; without it the float32 parts of the policy are the same on every machine.
    """

    model: ClassVar[Precision]
    truth: ClassVar[Precision]

    tf32: bool = False

    def holds(self) -> str:
        return "tf32=true" if self.tf32 else ""

    @property
    def idle(self) -> bool:
        """The model was built in it, with the switch set."""
        return type(self).apply is PrecisionOption.apply

    def apply(self, policy: Policy) -> None:
        allow_tf32(self.tf32)
        policy.note(
            f"activations {policy.model.precision.activations}, TF32 {'allowed' if self.tf32 else 'not allowed'}"
        )

    def products(self) -> str:
        """The narrowest kind of matrix product in it, by its name in `pi0exp.rates`: floors are counted for it."""
        if self.model.activations is torch.float32:
            return "tf32" if self.tf32 else "fp32"
        return "bf16"


def allow_tf32(allowed: bool) -> None:
    """For matrix products and convolutions of this process."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
