"""The part of a measurement that a profile makes: the names for the proof, metrics, and files for the reader."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pi0exp.breakdown import Breakdown, break_down
from pi0exp.config import MeasureConfig
from pi0exp.errors import UserError
from pi0exp.profiling import TRACE, profile
from pi0exp.replay import ORDER
from pi0exp.slices import Ceilings
from pi0exp.subject import Instance


@dataclass(frozen=True)
class GpuTime:
    """names: of kernels and runtime calls. found: None where the profiler recorded no kernel."""

    names: set[str]
    found: Breakdown | None

    def metrics(self, p50_ms: float) -> dict[str, float]:
        """Of one call; p50_ms: its latency without a profiler, to which the profiled span is compared.

        stage_ms only where the calls are replays of one graph: elsewhere events around the stages are better.
        """
        if self.found is None:
            return {}
        made = self.found.metrics()
        if self.found.span_ms is not None:
            made["gpu/span_over_p50"] = self.found.span_ms / p50_ms
        if self.found.stages_by == ORDER:
            made |= {f"stage_ms/{stage}": value for stage, value in self.found.stage_ms.items()}
        return made

    def files(self) -> dict[str, str]:
        """breakdown.json: what `python -m pi0exp.breakdown --json` says of the trace."""
        return {} if self.found is None else {"breakdown.json": json.dumps(self.found.to_dict())}

    def facts(self) -> dict[str, str]:
        if self.found is None:
            return {"kernels": "the profiler recorded none"}
        return {"kernels by stage": self.found.stages_by} if not self.found.stages else {}


def gpu_time(instance: Instance, settings: MeasureConfig, ceilings: Ceilings | None, folder: Path | None) -> GpuTime:
    """Profile some calls. ceilings: of this run, for the rates of products. folder: for the trace.

    Raises RuntimeError where the profile cannot be made sense of.
    """
    with tempfile.TemporaryDirectory(prefix="pi0exp-") as scratch:
        path = (folder if folder is not None and settings.keep_trace else Path(scratch)) / TRACE
        try:
            trace = profile(instance, settings.profile_calls, ceilings, path)
            return GpuTime(trace.names(), break_down(trace) if trace.has_kernels else None)
        except UserError as error:  # a file that the user did not give
            raise RuntimeError(f"the profile cannot be read: {error}") from error
