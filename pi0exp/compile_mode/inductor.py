"""torch.compile with Inductor: what its modes share.

Not one graph for the whole call: ten unrolled steps are 17 000 nodes, which Inductor does not finish in minutes. What
is compiled is either each function that computes a stage (the denoising steps share one) or each transformer block.

Dynamo's settings hold for the whole process. They are set here and nowhere else: beyond its limit of recompilations
Dynamo falls back to eager execution in silence, here it is an error. Inductor's settings are passed with each function
and never set globally. Its cache on disk (TORCHINDUCTOR_CACHE_DIR) is left on; `compile/cache_misses` tells whether
`startup_s/compile` is that of a cold one.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._inductor import list_mode_options, list_options

from pi0exp.compile_mode.option import CompileOption
from pi0exp.machine import Machine
from pi0exp.model.observation import Observation
from pi0exp.option import Numerics, Requires
from pi0exp.policy import DeviceCall, Policy


class Region(StrEnum):
    """What is compiled by itself.

    stage: each function that computes a stage, embeddings and projections included.
    block: each transformer block; all blocks of a stage share what was compiled for the first ones, which takes a
    fraction of the time. Patch embedding, prompt embedding and the projections around the expert stay eager.
    """

    stage = "stage"
    block = "block"


_VARIANTS = {Region.stage: 1, Region.block: 4}
"""Compilations of one function for one structure. The blocks of prefill and denoise are of one class, and the first
block of each differs from the others: it has no branch to add and makes the mask."""


DEPENDENT = {"triton.enable_pdl": True}
KNOWS_DEPENDENT = Requires(vendors=("nvidia",), archs=("sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"))
"""Compute capability 9.0 and later, which is what Inductor asks (torch/_inductor/codegen/triton.py)."""


@dataclass(frozen=True)
class Compiled(CompileOption):
    """Static shapes; a new structure of the observation compiles anew. Numerics: fusion changes roundings.

    region: what is compiled by itself. fullgraph: an operation that cannot be traced is an error, not a break of the
    graph. max_structures: how many different structures are compiled before it is an error. dependent_launches: each
    kernel that is generated starts while the one in front of it ends (`pi0exp.kernels.dependent`), which Inductor calls
    `triton.enable_pdl` and leaves off.
    Source of modes and settings: torch._inductor.list_mode_options() and torch/_inductor/config.py.
    Proof: kernels that Triton compiled for Inductor, named triton_...; where the mode captures, graph launches, too.
    """

    numerics = Numerics.REORDERED
    mode: ClassVar[str] = "default"
    compiles: ClassVar[bool] = True

    region: Region = Region.stage
    fullgraph: bool = True
    max_structures: int = 16
    dependent_launches: bool = False

    def __post_init__(self) -> None:
        if self.max_structures < 1:
            raise ValueError(f"max_structures is {self.max_structures}; it must be 1 or more")
        if self.dependent_launches:
            refuse_unknown(DEPENDENT, "dependent_launches: ")

    def unmet(self, machine: Machine) -> list[str]:
        reasons = super().unmet(machine)
        if self.dependent_launches and not reasons:  # Inductor would leave them ordinary ones in silence
            reasons = [f"dependent_launches {reason}" for reason in KNOWS_DEPENDENT.unmet(machine)]
        return reasons

    def settings(self) -> dict[str, Any]:
        return self.own_settings() | (DEPENDENT if self.dependent_launches else {})

    def own_settings(self) -> dict[str, Any]:
        """Those of the mode."""
        settings: dict[str, Any] = dict(list_mode_options(self.mode))
        if self.captures:
            # What cannot be captured is an error; Inductor would run it without a graph.
            settings["triton.cudagraph_or_error"] = True
        return settings

    def proof(self) -> str:
        return r"^triton_"

    def proofs(self) -> list[str]:
        return [self.proof(), r"(cuda|hip)GraphLaunch"] if self.captures else [self.proof()]

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        compile_one = partial(torch.compile, options=self.settings() or None, fullgraph=self.fullgraph, dynamic=False)
        what = f"torch.compile(mode={self.mode}{self.remark()})"
        for stage in stages:
            if self.region is Region.stage:
                policy.wrap_stage(stage, compile_one, what)
            else:
                policy.wrap_blocks(stage, compile_one, what)

    def remark(self) -> str:
        """What the mode's name does not say."""
        return ", dependent launches" if self.dependent_launches else ""


def prepare_call(policy: Policy, modes: Sequence[Compiled]) -> None:
    """What the modes of the stages need once: limits of the process, and wrappers of the call."""
    # Blocks of two stages are of one class, and the limit is that of a function: it holds for their sum.
    limit = sum(mode.max_structures * _VARIANTS[mode.region] for mode in modes)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, torch._dynamo.config.accumulated_recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    policy.wrap_call(one_kind_of_noise, "noise as the tensors of later steps are")
    captures = any(mode.captures for mode in modes)
    if captures:
        policy.wrap_call(one_step, "one generation of Inductor's CUDA graphs a call")
    policy.count_with(CompileClock(captures).counters)


def one_kind_of_noise(call: DeviceCall) -> DeviceCall:
    """`call` with noise that is an inference tensor, as what the steps compute is.

    Dynamo tells the two kinds apart and would compile the denoising step twice, once for the first step alone.
    """

    def step(observation: Observation, noise_BCA: Tensor) -> Tensor:
        return call(observation, noise_BCA if noise_BCA.is_inference() else noise_BCA.clone())

    return step


def one_step(call: DeviceCall) -> DeviceCall:
    """`call` as one generation of Inductor's graphs: what they return lives until the next call begins.

    Without the mark each compiled function would begin a generation, and the keys and values of the prefill, which
    live in the memory of its graph, could be overwritten before the last step has read them. The actions are copied:
    the caller holds them beyond the next call.
    """

    def step(observation: Observation, noise_BCA: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(observation, noise_BCA).clone()

    return step


def refuse_unknown(settings: dict[str, Any], where: str = "options.") -> None:
    """Raises ValueError for a setting that the Inductor of this PyTorch does not have. where: in front of its name."""
    known = set(list_options())
    for name in settings:
        if name not in known:
            raise ValueError(f"{where}{name} is no setting of Inductor in torch {torch.__version__}")


class CompileClock:
    """Counts and times compilations of this process from now on.

    compile/graphs, compile/breaks: graphs that were traced, and breaks between them. compile/recompiles: compilations
    of a function that had been compiled before, for another structure or another block. compile/cache_hits, _misses,
    _bypasses: of Inductor's cache on disk, a lookup each graph. startup_s/compile: seconds of tracing, code generation
    and autotuning for all structures, loading from the cache included; `startup_s/first_call` contains those of the
    first. With a mode that captures, also compile/recordings and startup_s/record, of its graphs, and
    compile/cudagraph_skips, of graphs that were refused.
    """

    def __init__(self, captures: bool) -> None:
        self.captures = captures
        self.seconds: Counter[CallbackTrigger] = Counter()
        self.events: Counter[CallbackTrigger] = Counter()
        self.recompiles = 0
        self._began = 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, event: CallbackArgs) -> None:
        self._began = time.perf_counter()

    def _end(self, event: CallbackArgs) -> None:
        # Callbacks come for the outermost event only, so that nothing is counted twice.
        self.seconds[event.callback_trigger] += time.perf_counter() - self._began  # type: ignore[assignment]
        self.events[event.callback_trigger] += 1
        # The id is function/compilation, with the number of a further attempt behind it.
        if event.callback_trigger is CallbackTrigger.DYNAMO and event.compile_id.split("/")[-1].split("_")[0] != "0":
            self.recompiles += 1

    def counters(self) -> dict[str, float]:
        seen, trace, record = torch._dynamo.utils.counters, CallbackTrigger.DYNAMO, CallbackTrigger.CUDAGRAPH_RECORDING
        inductor = seen["inductor"]
        values: dict[str, float] = {
            "compile/graphs": seen["stats"]["unique_graphs"],
            "compile/breaks": sum(seen["graph_break"].values()),
            "compile/recompiles": self.recompiles,
            "compile/cache_hits": inductor["fxgraph_cache_hit"],
            "compile/cache_misses": inductor["fxgraph_cache_miss"],
            "compile/cache_bypasses": inductor["fxgraph_cache_bypass"],
            "startup_s/compile": self.seconds[trace],
        }
        if self.captures:
            values |= {
                "compile/recordings": self.events[record],
                "compile/cudagraph_skips": inductor["cudagraph_skips"],
                "startup_s/record": self.seconds[record],
            }
        return {name: float(value) for name, value in values.items()}
