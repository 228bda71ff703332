"""torch.compile with its default mode: Inductor's fusions, no autotuning, no CUDA graphs of its own."""

from dataclasses import dataclass

from pi0exp.compile_mode.inductor import Compiled


@dataclass(frozen=True)
class Default(Compiled):
    """Inductor as it is."""
