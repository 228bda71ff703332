"""No compilation: operations run as written."""

from dataclasses import dataclass

from pi0exp.option import Option


@dataclass(frozen=True)
class NoCompile(Option):
    """Leave the stages as they are."""
