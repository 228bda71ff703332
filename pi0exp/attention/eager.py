"""Attention as the model defines it: scores, mask, softmax and mix, each an operation of its own."""

from dataclasses import dataclass

from pi0exp.option import StagedOption


@dataclass(frozen=True)
class Eager(StagedOption):
    """Leave the model's own attention in place."""
