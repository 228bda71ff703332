"""torch.compile with wider fusion and finer tuning than any mode has, chosen setting by setting."""

from dataclasses import dataclass, field
from typing import Any

from pi0exp.compile_mode.inductor import Compiled, refuse_unknown
from pi0exp.option import ANY_GPU


@dataclass(frozen=True)
class Aggressive(Compiled):
    """The settings in `options`, passed with each function; all others are Inductor's defaults.

    Needs a GPU: the settings are about the kernels that Triton compiles.

    options: name in torch/_inductor/config.py -> value. A name that this PyTorch does not know is refused.
    """

    requires = ANY_GPU

    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.options:
            raise ValueError("options is empty; choose compile_mode=default")
        refuse_unknown(self.options)

    def own_settings(self) -> dict[str, Any]:
        return dict(self.options)

    def remark(self) -> str:
        return "".join(f", {name}={value}" for name, value in self.options.items()) + super().remark()
