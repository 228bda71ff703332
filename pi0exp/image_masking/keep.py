"""Absent cameras are computed and their tokens masked, as in the original."""

from dataclasses import dataclass

from pi0exp.option import Option


@dataclass(frozen=True)
class Keep(Option):
    """Leave the observation as it is."""
