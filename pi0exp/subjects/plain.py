"""Which options of a stack do nothing for a subject: they are refused instead of being recorded without effect."""

from collections.abc import Mapping

from pi0exp.attention.eager import Eager
from pi0exp.compile_mode.none import NoCompile
from pi0exp.config import Stack
from pi0exp.fusion.fusion import Fusion
from pi0exp.gemm.blas import Blas
from pi0exp.graphs.none import NoGraph
from pi0exp.image_masking.keep import Keep
from pi0exp.option import Option
from pi0exp.precision.bf16 import Bf16

PLAIN: dict[str, Option] = {
    "image_masking": Keep(),
    "fusion": Fusion(),
    "precision": Bf16(),
    "gemm": Blas(),
    "attention": Eager(),
    "compile_mode": NoCompile(),
    "graphs": NoGraph(),
}
"""Group -> the option that leaves everything as it is."""


def foreign(stack: Stack, taken: tuple[str, ...], subject: str, names: Mapping[str, str]) -> list[str]:
    """One sentence for each group that is not `taken` by the subject and yet not plain. names: the options' words."""
    return [
        f"{group}={names[group]} has no effect with subject={subject}; leave {group} as it is"
        for group, option in stack.options()
        if group not in taken and option != PLAIN[group]
    ]
