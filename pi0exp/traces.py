"""Read the file of a profiler, whichever wrote it, into slices of GPU time.

Chrome traces as PyTorch's profiler (Kineto) exports them, on NVIDIA and on AMD, plain or gzip; CSV files of rocprof,
rocprofv2, rocprofv3 and Nsight Systems (traces_csv). The ranges in this project's own profiles tell calls and stages
apart.
"""

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pi0exp.errors import UserError
from pi0exp.slices import Ceilings, Kind, Product, Slice, Trace
from pi0exp.traces_csv import read_csv

CALL_RANGE, LAUNCHED_RANGE, STAGE_RANGE = "pi0exp.call", "pi0exp.launched", "pi0exp.stage."
"""Names of record_function ranges: a profiled call, one that is launched kernel by kernel, and (with a stage behind it)
the functions of a stage."""
CEILINGS = "pi0exp_ceilings"
"""The name under which a trace of this project carries the ceilings of its run, beside its events."""

KNOWN = (
    "Chrome traces of PyTorch's profiler (.json, .json.gz) and CSV files of rocprof, rocprofv2, rocprofv3 (traces,"
    " stats) and nsys stats (cuda_gpu_trace, cuda_gpu_kern_sum)"
)

_KINDS = {"kernel": Kind.kernel, "gpu_memcpy": Kind.copy, "gpu_memset": Kind.fill}
"""Kineto's categories of what runs on the GPU, the same for CUPTI, roctracer and rocprofiler-sdk."""
_BINARIES = {".nsys-rep": "nsys stats --format csv --report cuda_gpu_trace", ".sqlite": "nsys stats --format csv",
             ".db": "rocpd convert -i {path} --output-format csv (rocprofv3), or give {csv} of the same run (rocprof)",
             ".rpd": "rpd2tracing.py"}  # fmt: skip
"""How to get at what is in a file of this kind."""


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises UserError, one line, for what is missing, foreign, torn or holds no GPU kernel."""
    trace = parse_trace(path)
    if not trace.has_kernels:
        raise UserError(
            f"{path}: holds no GPU kernel; record it with a profiler of the GPU (ProfilerActivity.CUDA in PyTorch)"
        )
    return trace


def parse_trace(path: Path) -> Trace:
    """The same, a file without a GPU kernel included."""
    if path.suffix in _BINARIES:
        how = _BINARIES[path.suffix].format(path=path, csv=path.with_suffix(".csv").name)
        raise UserError(f"{path}: {path.suffix} files are not read; export it first: {how}")
    try:
        content = path.read_bytes()
        packed = content[:2] == b"\x1f\x8b"
        text = (gzip.decompress(content) if packed else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the compressed file is torn ({error}); record it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text; {KNOWN} are read") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return _read_kineto(path, text) if text.lstrip()[0] in "{[" else read_csv(path, text, KNOWN)


def _read_kineto(path: Path, text: str) -> Trace:
    try:
        found = json.loads(text, strict=False)  # Kineto does not escape control characters in names
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: torn or no JSON ({error})") from error
    events = found.get("traceEvents") if isinstance(found, dict) else found
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UserError(f"{path}: no Chrome trace, which has a list of objects called traceEvents; {KNOWN} are read")
    if any(_is_rocprof(event) for event in events):
        csv = path.name.removesuffix(".gz").removesuffix(".json") + ".csv"
        raise UserError(f"{path}: rocprof's own Chrome trace has times cut to microseconds; give {csv} of the same run")
    try:
        ceilings = found.get(CEILINGS) if isinstance(found, dict) else None
        trace = _Kineto([event for event in events if event.get("ph") == "X"]).trace()
        return trace if ceilings is None else replace(trace, ceilings=Ceilings(**ceilings))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: an event is not as PyTorch's profiler writes it ({reason})") from error


def _is_rocprof(event: dict[str, Any]) -> bool:
    """Its events have no categories; their arguments are the columns of its CSV file."""
    args = event.get("args")
    return "cat" not in event and isinstance(args, dict) and "BeginNs" in args


@dataclass(frozen=True)
class _Launch:
    """The host's side of a slice. thread: (pid, tid). op: external id of the operation around it."""

    thread: tuple[Any, Any]
    ts: float
    op: int | None


class _Kineto:
    """The complete events of a Chrome trace, and what belongs to what among them."""

    def __init__(self, events: list[dict[str, Any]]):
        self.events = events
        self.launches: dict[int, _Launch] = {}
        self.products: dict[int, Product] = {}
        runtime = set()
        for event in events:
            category, args = str(event.get("cat", "")), event.get("args") or {}
            if category.endswith(("_runtime", "_driver")):
                runtime.add(str(event["name"]))
                if args.get("correlation"):
                    launch = _Launch((event["pid"], event["tid"]), float(event["ts"]), args.get("External id"))
                    self.launches[int(args["correlation"])] = launch
            elif category == "cpu_op" and (product := product_of(str(event["name"]), args)):
                self.products[int(args["External id"])] = product
        self.runtime = frozenset(runtime)
        self.calls, self.launched = self._ranges(CALL_RANGE), self._ranges(LAUNCHED_RANGE)
        self.stages = self._ranges(STAGE_RANGE)

    def _ranges(self, prefix: str) -> "_Ranges":
        return _Ranges(
            event
            for event in self.events
            if event.get("cat") == "user_annotation" and str(event["name"]).startswith(prefix)
        )

    def trace(self) -> Trace:
        given = sorted(self._slices(), key=lambda one: one[0].start_us or 0.0)
        calls, launched = [], []
        for one, launch in given:
            number = self.calls.of(one, launch)
            if number is not None or not self.calls.count:
                calls.append(self._told(one, launch, number))
            elif self.launched.of(one, launch) is not None:
                launched.append(self._told(one, launch, None))
        return Trace("Chrome trace", calls, launched, self.runtime)

    def _slices(self) -> Iterator[tuple[Slice, _Launch | None]]:
        for event in self.events:
            kind = _KINDS.get(str(event.get("cat", "")).lower())
            if kind is None:
                continue
            args = event.get("args") or {}
            launch = self.launches.get(int(args.get("correlation", 0)))
            op = args.get("External id", launch.op if launch else None)
            yield (
                Slice(
                    str(event["name"]),
                    float(event["dur"]),
                    float(event["ts"]),
                    kind,
                    device=str(args.get("device", event.get("pid", ""))),
                    op=None if op is None else int(op),
                ),
                launch,
            )

    def _told(self, one: Slice, launch: _Launch | None, call: int | None) -> Slice:
        stage = self.stages.name_at(launch).removeprefix(STAGE_RANGE)
        product = None if one.op is None or one.kind is not Kind.kernel else self.products.get(one.op)
        return replace(one, call=call, stage=stage, product=product)


class _Ranges:
    """Ranges of the host that do not overlap on one thread, numbered in the order of time."""

    def __init__(self, events: Iterable[dict[str, Any]]):
        ordered = sorted(events, key=lambda event: float(event["ts"]))
        self.count = len(ordered)
        self._by_thread: dict[tuple[Any, Any], list[tuple[float, float, int, str]]] = {}
        for number, event in enumerate(ordered):
            start = float(event["ts"])
            row = (start, start + float(event["dur"]), number, str(event["name"]))
            self._by_thread.setdefault((event["pid"], event["tid"]), []).append(row)

    def _find(self, launch: _Launch) -> tuple[float, float, int, str] | None:
        rows = self._by_thread.get(launch.thread, [])
        place = bisect_right(rows, launch.ts, key=lambda row: row[0]) - 1
        return rows[place] if place >= 0 and launch.ts <= rows[place][1] else None

    def of(self, one: Slice, launch: _Launch | None) -> int | None:
        """The number of the range in which a slice was launched.

        Where the profiler does not say who launched it, the last one that had begun: the GPU runs it after that.
        """
        if launch is not None:
            found = self._find(launch)
            return None if found is None else found[2]
        rows = [row for rows in self._by_thread.values() for row in rows]
        return max((number for start, _, number, _ in rows if start <= (one.start_us or 0.0)), default=None)

    def name_at(self, launch: _Launch | None) -> str:
        found = None if launch is None else self._find(launch)
        return "" if found is None else found[3]


_FACTORS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::_addmm_activation": 1, "aten::baddbmm": 1,
    "aten::_scaled_mm": 0, "aten::_int_mm": 0,
}  # fmt: skip
"""Operation -> the place of its first factor among the inputs; [.., m, k] and then [.., k, n]."""
_LINEAR = ("aten::linear", "pi0exp::", "aiter::")
"""Operations, or namespaces of operations, whose first two inputs are [.., k] and a weight [n, k] if they multiply."""


def product_of(name: str, args: dict[str, Any]) -> Product | None:
    """The product that an operation computes, from the shapes that the profiler recorded (record_shapes); else None."""
    shapes, types = args.get("Input Dims") or [], args.get("Input type") or []
    first = _FACTORS.get(name, 0 if name.startswith(_LINEAR) else None)
    if first is None or len(shapes) < first + 2 or len(types) <= first:
        return None
    a, b = shapes[first], shapes[first + 1]
    dtype = str(types[first]).split("::")[-1]
    if name in _FACTORS:
        if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2]:
            return None
        return Product(a[0] if len(a) == 3 else 1, a[-2], b[-1], a[-1], dtype)
    if len(a) < 2 or len(b) != 2 or a[-1] != b[1] or ("gemm" not in name and "linear" not in name):
        return None
    rows = 1
    for size in a[:-1]:
        rows *= size
    return Product(1, rows, b[0], b[1], dtype)
