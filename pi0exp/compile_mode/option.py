"""What all compile modes are: an option of stages that does once what concerns the process and the whole call."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pi0exp.option import StagedOption
from pi0exp.policy import Policy


@dataclass(frozen=True)
class CompileOption(StagedOption):
    """One mode for all stages, or another one for some: `compile_mode=default compile_mode.vision=none`."""

    compiles: ClassVar[bool] = False
    captures: ClassVar[bool] = False
    """The mode makes CUDA graphs of its own."""

    def settings(self) -> dict[str, Any]:
        """Inductor's settings that differ from its defaults."""
        return {}

    def apply(self, policy: Policy) -> None:
        super().apply(policy)
        if modes := [mode for _, mode in self.parts() if mode.compiles]:  # type: ignore[attr-defined]
            from pi0exp.compile_mode.inductor import prepare_call  # imports the compiler, which takes seconds

            prepare_call(policy, modes)  # type: ignore[arg-type]
