"""No graph: every kernel is launched from Python."""

from dataclasses import dataclass

from pi0exp.option import Option


@dataclass(frozen=True)
class NoGraph(Option):
    """Leave the call as it is."""
