"""CSV files of rocprof, rocprofv2, rocprofv3 and Nsight Systems: one row a kernel, or one row a name with sums.

The header tells which tool wrote the file. Columns, as the tools' documentation names them:
  rocprof                     results.csv: KernelName, BeginNs, EndNs, gpu-id
  rocprofv2                   results_*.csv: Kernel_Name, Start_Timestamp, End_Timestamp (ns), GPU_ID
  rocprofv3                   kernel_trace.csv: Kernel_Name, Start_Timestamp, End_Timestamp (ns), Agent_Id
  Omniperf                    timestamps.csv: rocprof's, with rocprofv2's names for some of the columns
  rocprof --stats, rocprofv3 --stats    Name, Calls, TotalDurationNs; older rocprofs write names without quotes
  nsys stats                  cuda_gpu_trace: Start, Duration, Device, Name; cuda_gpu_kern_sum: Total Time, Instances,
                              Name; the unit stands in brackets behind the column's name
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pi0exp.errors import UserError
from pi0exp.slices import Kind, Slice, Trace

_PREAMBLE_LINES = 30
"""`nsys stats` says on standard output what it exports before it prints the header."""
_UNITS_US = {"ns": 1e-3, "nsec": 1e-3, "us": 1.0, "usec": 1.0, "μs": 1.0, "ms": 1e3, "msec": 1e3, "s": 1e6, "sec": 1e6}
_NO_KERNEL = re.compile(
    r"hip[A-Z]\w*|hsa_\w+|__hip\w+|roctx\w+|Copy(Host|Device)To(Host|Device)\w*|FillBuffer|async-copy"
    r"|(KERNEL|MEMORY|SCRATCH|COUNTER|HIP|HSA|MARKER|RCCL)_[A-Z_]+"
)
"""Names in statistics of host calls, of copies and of whole domains, which have the columns of those of kernels."""
_COUNTER = re.compile(r"Counter_Name|(?!GPU_ID$)[A-Z][A-Z0-9]*_[A-Z0-9_]+(_[a-z]+|\[\d+\])?")
"""Columns of AMD's counters: SQ_WAVES, TCC_HIT_sum, TCC_REQ[3], FETCH_SIZE. Some derived ones, such as VALUBusy, are
named like other columns and not found."""


@dataclass(frozen=True)
class _Layout:
    """What identifies a file and where its values stand; names of columns without their units.

    Either `end` or `duration` is there. mark: another column that the file must have. bare: whether names can stand
    without quotes, with commas in them.
    """

    format: str
    name: str
    start: str = ""
    end: str = ""
    duration: str = ""
    count: str = ""
    device: str = ""
    mark: str = ""
    bare: bool = False

    def fits(self, titles: set[str]) -> bool:
        return {self.name, self.start, self.end, self.duration, self.count, self.mark} - {""} <= titles


_LAYOUTS = (
    _Layout("rocprof", "KernelName", start="BeginNs", end="EndNs", device="gpu-id"),
    _Layout(
        "Omniperf timestamps", "Kernel_Name", start="Start_Timestamp", end="End_Timestamp", device="GPU_ID",
        mark="DispatchNs",
    ),
    _Layout("rocprofv2", "Kernel_Name", start="Start_Timestamp", end="End_Timestamp", device="GPU_ID", mark="GPU_ID"),
    _Layout("rocprofv3 kernel trace", "Kernel_Name", start="Start_Timestamp", end="End_Timestamp", device="Agent_Id"),
    _Layout("rocprof stats", "Name", duration="TotalDurationNs", count="Calls", bare=True),
    _Layout("nsys cuda_gpu_trace", "Name", start="Start", duration="Duration", device="Device", mark="GrdX"),
    _Layout("nsys cuda_gpu_kern_sum", "Name", duration="Total Time", count="Instances"),
)  # fmt: skip
"""The first that fits is the one."""


def read_csv(path: Path, text: str, known: str) -> Trace:
    """The trace in the text of a CSV file. Raises UserError, one line; `known` says there what can be read."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    try:
        header, layout = _header(path, rows, known)
        if counters := [title for title in header if _COUNTER.fullmatch(title.strip())]:
            raise UserError(
                f"{path}: has counters ({counters[0]}), for which kernels run one by one, or several times;"
                " give a trace without them (Omniperf: timestamps.csv)"
            )
        table = _Table(layout, header)
        slices = [
            table.slice(row, f"{path}: line {rows.line_num}") for row in rows if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num} is no CSV ({error})") from error
    if layout.format == "rocprof stats" and slices and all(_NO_KERNEL.fullmatch(one.name) for one in slices):
        raise UserError(
            f"{path}: statistics of host calls, copies or domains, not of kernels;"
            " take the file of the kernels (kernel_stats, results.stats)"
        )
    return Trace(layout.format, sorted(slices, key=lambda one: one.start_us or 0.0))


class _Table:
    """Rows under one header."""

    def __init__(self, layout: _Layout, header: list[str]):
        self.layout, self.width = layout, len(header)
        self.origin: float | None = None
        self.places = {_plain(title): place for place, title in enumerate(header)}
        self.scales = {_plain(title): _UNITS_US[_unit(title) or "ns"] for title in header}

    def slice(self, row: list[str], where: str) -> Slice:
        """One row; `where` it stands, for the error."""
        if self.layout.bare:
            row = self._joined(row)
        if len(row) != self.width:
            raise UserError(f"{where} has {len(row)} cells where the header has {self.width}: the file is torn")
        layout, name = self.layout, row[self.places[self.layout.name]]
        # Differences before microseconds: of a long count of nanoseconds, microseconds lose the last digits.
        start, begin = None, 0.0
        if layout.start:
            begin = self._value(row, layout.start, where)
            self.origin = begin if self.origin is None else self.origin
            start = (begin - self.origin) * self.scales[layout.start]
        until = layout.duration or layout.end
        duration = (self._value(row, until, where) - (begin if layout.end else 0.0)) * self.scales[until]
        if duration < 0:
            raise UserError(f"{where}: {name[:60]} ends before it begins")
        count = int(_number(row[self.places[layout.count]], where, layout.count)) if layout.count else 1
        device = row[self.places[layout.device]] if layout.device in self.places else ""
        return Slice(name, duration, start, _kind(name), count, device)

    def _joined(self, row: list[str]) -> list[str]:
        """The row with the name in one cell, where commas of a name without quotes have divided it."""
        place, more = self.places[self.layout.name], max(len(row) - self.width, 0)
        return [*row[:place], ", ".join(row[place : place + more + 1]), *row[place + more + 1 :]]

    def _value(self, row: list[str], column: str, where: str) -> float:
        return _number(row[self.places[column]], where, column)


def _header(path: Path, rows: Iterator[list[str]], known: str) -> tuple[list[str], _Layout]:
    first: list[str] = []
    for _, row in zip(range(_PREAMBLE_LINES), rows, strict=False):
        titles = {_plain(title) for title in row}
        for layout in _LAYOUTS:
            if layout.fits(titles):
                return row, layout
        first = first or row
    columns = ", ".join(first)[:80]
    raise UserError(f"{path}: the columns {columns!r} are of no known file; {known} are read")


def _plain(title: str) -> str:
    return re.sub(r"\s*\([^()]*\)$", "", title.strip())


def _unit(title: str) -> str:
    found = re.search(r"\(([^()]*)\)$", title.strip())
    return found[1] if found and found[1] in _UNITS_US else ""


def _number(text: str, where: str, column: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError as error:
        raise UserError(f"{where}: {column} is {text[:40]!r}, which is no number; the file is torn") from error


def _kind(name: str) -> Kind:
    """nsys lists copies and fills among the kernels: [CUDA memcpy Host-to-Device], [CUDA memset]."""
    if name.startswith("[CUDA mem"):
        return Kind.fill if "memset" in name else Kind.copy
    return Kind.kernel
