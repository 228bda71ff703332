"""Where the GPU's time goes:  python -m pi0exp.breakdown FILE [--json]

FILE is a trace of any profiler that pi0exp.traces reads. Each kernel falls into the first category of
pi0exp.kernel_table that its name matches. Every run on a GPU carries these figures as metrics and the trace they come
from as a file. Where slices overlap, each instant counts for the one that began first (pi0exp.timeline), so that times
add up; a viewer of the trace shows longer durations of the same kernels.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi0exp import pipes
from pi0exp.errors import UserError
from pi0exp.kernel_table import CATEGORIES, category
from pi0exp.products import ProductRow, product_rows
from pi0exp.replay import tell
from pi0exp.result import CONFIG_ERROR
from pi0exp.slices import Ceilings, Slice, Trace
from pi0exp.timeline import extent, own
from pi0exp.traces import read_trace

STAGES = ("vision", "prefill", "denoise", "other")
"""The stages of a call; other is what runs between them: the Euler steps, copies into and out of graphs."""


@dataclass(frozen=True)
class KernelRow:
    """All slices of one name. count, ms: of one call; ms is their own time. share: of that of all."""

    name: str
    category: str
    count: float
    ms: float
    share: float


@dataclass(frozen=True)
class Breakdown:
    """The GPU time of one call, the mean of `calls`; of the whole file where calls is 1 and the file marks none.

    ms: category -> milliseconds that are its slices' own, which add up to kernels_ms. launches: kernels, copies, fills.
    span_ms: from the first slice to the last, with the gaps between calls; busy_ms: of it, where any slice runs, which
    is kernels_ms in another way of counting; the rest is idle; overlap_ms: of it, where two or more run. None where the
    file has only sums: kernels_ms then counts an instant as often as there are slices in it.
    stages: stage -> category -> milliseconds; stage_ms: stage -> milliseconds from its first slice to what follows it.
    Both empty where stages are not told; stages_by says how they are, or why they are not.
    products: the shapes that are known; products_ms: their share of ms["gemm"], in milliseconds.
    """

    format: str
    calls: int
    launches: float
    ms: dict[str, float]
    span_ms: float | None
    busy_ms: float | None
    overlap_ms: float | None
    stages_by: str
    kernels: list[KernelRow]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stage_ms: dict[str, float] = field(default_factory=dict)
    products: list[ProductRow] = field(default_factory=list)
    ceilings: Ceilings | None = None

    @property
    def kernels_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def products_ms(self) -> float:
        return sum(row.ms for row in self.products)

    @property
    def idle_share(self) -> float | None:
        return None if self.span_ms is None or self.busy_ms is None else 1 - self.busy_ms / self.span_ms

    def shares(self) -> dict[str, float]:
        return {name: value / self.kernels_ms for name, value in self.ms.items()}

    def metrics(self) -> dict[str, float]:
        """Milliseconds of one call and shares, by the names under which a run keeps them.

        Of a stage only the categories that it has.
        """
        made = {f"kernels_ms/{name}": value for name, value in self.ms.items()}
        made |= {f"kernels_share/{name}": value for name, value in self.shares().items()}
        made |= {"gpu/launches": self.launches}
        if self.span_ms is not None and self.busy_ms is not None and self.overlap_ms is not None:
            made |= {"gpu/span_ms": self.span_ms, "gpu/busy_ms": self.busy_ms}
            made |= {
                "gpu/idle_share": 1 - self.busy_ms / self.span_ms,
                "gpu/overlap_share": self.overlap_ms / self.span_ms,
                # 1, but for roundings, where no slice is lost and no instant is counted twice.
                "gpu/accounted_share": (self.kernels_ms + self.span_ms - self.busy_ms) / self.span_ms,
            }
        for stage, values in self.stages.items():
            made |= {f"kernels_ms_{stage}/{name}": value for name, value in values.items() if value}
        if self.products_ms:
            made["gemm/shapes_known_share"] = self.products_ms / self.ms["gemm"]
            made["gemm/tflop_per_s"] = _flops(self.products) / self.products_ms / 1e9
            if rated := [row for row in self.products if row.of_ceiling is not None and row.of_roofline is not None]:
                total = sum(row.ms for row in rated)
                made["gemm/ceiling_share"] = sum(row.ms * (row.of_ceiling or 0.0) for row in rated) / total
                made["gemm/roofline_share"] = sum(row.ms * (row.of_roofline or 0.0) for row in rated) / total
        return made

    def to_dict(self) -> dict[str, Any]:
        """The whole, as JSON has it."""
        sums = {"kernels_ms": self.kernels_ms, "idle_share": self.idle_share, "products_ms": self.products_ms}
        return asdict(self) | sums | {"shares": self.shares()}


def _flops(rows: Iterable[ProductRow]) -> float:
    return sum(row.product.flops * row.count for row in rows)


def break_down(trace: Trace, calls: int | None = None) -> Breakdown:
    """The breakdown of a trace. calls: how many it holds, where it does not mark them.

    Raises UserError for slices of several GPUs and for calls that contradict the trace.
    """
    devices = {one.device for one in trace.slices}
    if len(devices) > 1:
        raise UserError(f"holds kernels of {len(devices)} GPUs ({', '.join(sorted(devices))}): choose one by --device")
    if calls is not None and trace.calls not in (None, calls):
        raise UserError(f"marks {trace.calls} calls itself; leave --calls {calls} out")
    number = trace.calls or calls or 1
    told = tell(trace)
    slices = own(told.trace.slices) if trace.timed else told.trace.slices
    ms = dict.fromkeys(CATEGORIES, 0.0)
    names: dict[str, list[Slice]] = defaultdict(list)
    for one in slices:
        ms[category(one)] += one.duration_us * 1e-3 / number
        names[one.name].append(one)
    total = sum(ms.values())
    if total == 0:
        raise UserError("its kernels took no time at all: no trace of a GPU")
    kernels = []
    for name, group in names.items():
        spent = sum(one.duration_us for one in group) * 1e-3 / number
        count = sum(one.count for one in group) / number
        kernels.append(KernelRow(name, category(group[0]), count, spent, spent / total))
    span = busy = overlap = None
    if trace.timed:
        whole = extent(trace.slices)
        span, busy, overlap = (us * 1e-3 / number for us in (whole.span_us, whole.busy_us, whole.overlap_us))
    return Breakdown(
        format=trace.format,
        calls=number,
        launches=sum(one.count for one in slices) / number,
        ms=ms,
        span_ms=span,
        busy_ms=busy,
        overlap_ms=overlap,
        stages_by=told.stages or f"not told apart: {told.why}",
        kernels=sorted(kernels, key=lambda row: -row.ms),
        stages=_stages(slices, number) if told.stages else {},
        stage_ms=_stage_ms(slices, number) if told.stages else {},
        products=product_rows(slices, number, trace.ceilings),
        ceilings=trace.ceilings,
    )


def _stages(slices: list[Slice], calls: int) -> dict[str, dict[str, float]]:
    made = {stage: dict.fromkeys(CATEGORIES, 0.0) for stage in STAGES}
    for one in slices:
        made[one.stage or "other"][category(one)] += one.duration_us * 1e-3 / calls
    return made


def _stage_ms(slices: list[Slice], calls: int) -> dict[str, float]:
    """A gap belongs to the stage before it; the one between two calls to none. slices: without overlaps."""
    made = dict.fromkeys(STAGES, 0.0)
    slices = [one for one in slices if one.duration_us]  # a gap behind one within another is that of the other
    for one, following in zip(slices, [*slices[1:], None], strict=True):
        last = following is None or following.call != one.call
        end = one.end_us if last or following is None else following.start_us
        made[one.stage or "other"] += ((end or 0.0) - (one.start_us or 0.0)) * 1e-3 / calls
    return made


def chosen_device(trace: Trace, device: str | None) -> Trace:
    """The slices of one GPU alone."""
    if device is None:
        return trace
    kept = [one for one in trace.slices if one.device == device]
    if not kept:
        found = ", ".join(sorted({one.device for one in trace.slices}))
        raise UserError(f"holds no kernel of GPU {device!r}, only of {found}")
    launched = [one for one in trace.launched if one.device == device]
    return Trace(trace.format, kept, launched, trace.runtime, trace.ceilings)


def main(arguments: list[str] | None = None) -> int:
    from pi0exp.breakdown_text import text

    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.breakdown",
        description="Where the GPU's time goes, by category, stage, kernel and shape of matrix product.",
        epilog="example: python -m pi0exp.breakdown trace.json.gz\n\n"
        "Where kernels overlap, each instant counts for the one that began first: times add up to the time in which\n"
        "the GPU does anything.\n\n"
        "exit codes: 0; 2 for a file that cannot be read",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        type=Path,
        help="Chrome trace of PyTorch's profiler (json, json.gz) or CSV of rocprof, rocprofv2, rocprofv3, nsys stats",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.add_argument(
        "--calls", type=int, help="calls that the file holds, where it does not mark them: times a call"
    )
    parser.add_argument("--device", help="of several GPUs this one, as the file names it")
    parser.add_argument("--top", type=int, default=15, help="how many kernels and shapes to list (15)")
    given = parser.parse_args(arguments)
    try:
        if given.calls is not None and given.calls < 1:
            raise UserError(f"--calls {given.calls}: must be 1 or more")
        trace = read_trace(given.file)
        try:
            found = break_down(chosen_device(trace, given.device), given.calls)
        except UserError as error:
            raise UserError(f"{given.file}: {error}") from error
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    print(json.dumps(found.to_dict(), indent=2) if given.json else text(found, given.top))
    return 0


if __name__ == "__main__":
    pipes.leave(main)
