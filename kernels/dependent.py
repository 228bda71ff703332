"""Dependent launches: a kernel starts while the one in front of it still runs, and waits there for its results.

Between two ordinary launches, also those of one graph, the GPU is empty for about a microsecond: the first must end
before the second begins to start. A dependent launch (programmatic dependent launch, sm_90 and later) may start as soon
as the one in front has said `gdc_launch_dependents` in all of its programs, or ended; `gdc_wait` then returns when all
that it wrote can be read. So a kernel that was launched so waits before it reads or writes what another kernel may
write or read; parameters alone, which no kernel of a call writes, may be read before. Every program must wait, for only
so does its own end mean that all in front of it have ended. And where one says `gdc_launch_dependents` only behind its
own `gdc_wait`, as a step's first kernel does (`stream_embed`), all that was in front of it has ended for whatever
starts behind it, which may read that before it waits itself.
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.gemm_epilogue import arch_of
from pi0exp.kernels.kernel import AheadOfTime


@triton.jit
def wait_for_front(PDL: tl.constexpr):
    """Lets the next kernel start and waits for the one in front, if PDL says that this launch is a dependent one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def dependent(x: Tensor, pdl: bool = True) -> bool:
    """Whether a launch for x is a dependent one. Tracers know no such launch; a traced kernel has an ordinary one."""
    return pdl and type(x) is Tensor and arch_of(x.device) == "sm_90"


def launch_behind(pdl: bool) -> dict[str, Any]:
    """What a kernel with a constexpr PDL is launched with."""
    return {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})


def also_dependent(*entries: AheadOfTime) -> tuple[AheadOfTime, ...]:
    """Compiles of kernels with a constexpr PDL: each as an ordinary launch and, for sm_90, as a dependent one."""
    ordinary = [replace(one, constants={**one.constants, "PDL": False}) for one in entries]
    behind = [
        replace(one, name=f"{one.name}, dependent", constants={**one.constants, "PDL": True}, targets=("sm_90",))
        for one in entries
    ]
    return (*ordinary, *behind)
