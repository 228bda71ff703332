"""torch.compile with its default mode, one graph a stage and one for the denoising step.

Not one graph for the whole call: ten unrolled steps are 17 000 nodes, which Inductor does not finish in minutes. The
steps share one compiled function, since only tensors differ between them.
"""

from dataclasses import dataclass
from functools import partial

import torch

from pi0exp.option import STAGES, Numerics, Option
from pi0exp.policy import Policy


@dataclass(frozen=True)
class Default(Option):
    """Inductor without CUDA graphs of its own, static shapes; a new structure of the observation compiles anew.

    fullgraph: an operation that cannot be traced is an error, not a break of the graph.
    max_structures: how many different shapes are compiled before it is an error, not a silent fall to eager.
    """

    numerics = Numerics.REORDERED
    fullgraph: bool = True
    max_structures: int = 16

    def __post_init__(self) -> None:
        if self.max_structures < 1:
            raise ValueError(f"max_structures is {self.max_structures}; it must be 1 or more")

    def proof(self) -> str:
        return r"^triton_"

    def apply(self, policy: Policy) -> None:
        # Dynamo falls back to eager in silence beyond its limit; this makes it an error instead.
        torch._dynamo.config.recompile_limit = self.max_structures
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        compile_stage = partial(torch.compile, mode="default", fullgraph=self.fullgraph, dynamic=False)
        for stage in STAGES:
            policy.wrap_stage(stage, compile_stage, "torch.compile(mode=default)")
        policy.count_with(_compiled)


def _compiled() -> dict[str, float]:
    counters = torch._dynamo.utils.counters
    return {
        "compile/graphs": float(counters["stats"]["unique_graphs"]),
        "compile/breaks": float(sum(counters["graph_break"].values())),
    }
