"""No compilation: operations run as written."""

from dataclasses import dataclass

from pi0exp.compile_mode.option import CompileOption


@dataclass(frozen=True)
class NoCompile(CompileOption):
    """Leave the stages as they are."""
