"""torch.compile with mode="max-autotune": matrix products as Triton templates where they beat the BLAS library.

Inductor measures its candidates while it compiles, which takes minutes; what it found is kept in its cache on disk.
"""

from dataclasses import dataclass
from typing import ClassVar

from pi0exp.compile_mode.inductor import Compiled
from pi0exp.compile_mode.reduce_overhead import ReduceOverhead
from pi0exp.option import ANY_GPU


@dataclass(frozen=True)
class MaxAutotune(ReduceOverhead):
    """Autotuned, and in CUDA graphs that Inductor manages."""

    mode: ClassVar[str] = "max-autotune"


@dataclass(frozen=True)
class MaxAutotuneNoGraphs(Compiled):
    """Autotuned, for `graphs=manual` or none. Needs a GPU, since Triton templates are what it chooses among."""

    requires = ANY_GPU
    mode: ClassVar[str] = "max-autotune-no-cudagraphs"
