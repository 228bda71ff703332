"""The table in which aiter finds the kernel for a product of one shape, and all that can be wrong with one.

aiter itself takes a wrong table in silence or fails far from the cause. The rules are those of v0.1.20.post1
(`aiter/tuned_gemm.py`, `csrc/py_itfs_cu/asm_gemm_a16w16.cu`, `csrc/py_itfs_cu/gemm_common.cu`), none of them run on AMD
hardware.

Sizes: a product of activations [M, K] with a weight [N, K].
"""

import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pi0exp.aiter import Gpu
from pi0exp.errors import UnsupportedError, UserError

KEY = ("gfx", "cu_num", "M", "N", "K", "bias", "dtype", "outdtype", "scaleAB", "bpreshuffle")
"""What aiter finds a row by."""
READ = ("libtype", "solidx", "splitK", "kernelName")
"""What it then reads of the row."""
LIBRARIES = ("asm", "hipblaslt", "skinny", "triton", "flydsl", "opus", "torch")
TAKE_SHUFFLED = ("asm", "hipblaslt", "flydsl")
"""Those that multiply a shuffled weight; the others stop at an assertion."""


@dataclass(frozen=True)
class Row:
    """One row. line: in the file, from 1, the header among them. dtype, outdtype: as text, "torch.bfloat16"."""

    line: int
    gpu: Gpu
    m: int
    n: int
    k: int
    bias: bool
    dtype: str
    outdtype: str
    scaled: bool
    shuffled: bool
    library: str
    split_k: int
    kernel: str

    def key(self) -> tuple[object, ...]:
        return self.gpu, self.m, self.n, self.k, self.bias, self.dtype, self.outdtype, self.scaled, self.shuffled


def read_table(path: Path) -> list[Row]:
    """The rows of a tuned table, each of them legal. Raises UserError that names file, line and reason."""
    if os.pathsep in str(path):
        raise UserError(
            f"{path}: aiter takes a path with {os.pathsep!r} for several tables, which it merges and rewrites"
        )
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, lines = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a table of tuned products: {error.strerror}") from error
    if missing := [name for name in (*KEY, *READ) if name not in columns]:
        old = ": a table of aiter before v0.1.16, to be tuned again" if "gfx" in missing else ""
        raise UserError(f"{path}: lacks the columns {', '.join(missing)}{old}")
    rows = [_row(path, number, cells) for number, cells in enumerate(lines, start=2)]
    first: dict[tuple[object, ...], int] = {}
    for row in rows:
        if reason := _illegal(row):
            raise UserError(f"{path}, line {row.line}: {reason}")
        if (line := first.setdefault(row.key(), row.line)) != row.line:
            raise UserError(
                f"{path}, lines {line} and {row.line}: two rows for one shape; aiter stops, or rewrites the file"
            )
    return rows


def _row(path: Path, line: int, cells: dict[str, str]) -> Row:
    flags = {"True": True, "False": False}
    try:
        return Row(
            line,
            Gpu(cells["gfx"], int(cells["cu_num"])),
            int(cells["M"]),
            int(cells["N"]),
            int(cells["K"]),
            flags[cells["bias"]],
            cells["dtype"],
            cells["outdtype"],
            flags[cells["scaleAB"]],
            flags[cells["bpreshuffle"]],
            cells["libtype"],
            int(cells["splitK"]),
            cells["kernelName"] or "",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}, line {line}: not a row of a tuned table: {error}") from error


_ASM = re.compile(r"bf16gemm_(?:fp32)?bf16_tn_(\d+)x(\d+)")
"""The assembly kernels, with the rows and columns of their tiles."""


def _illegal(row: Row) -> str:
    """Why aiter would refuse the row, or take another meaning from it, when it is used; empty if it would not."""
    if row.library not in LIBRARIES:
        return f"libtype {row.library!r} is none of {', '.join(LIBRARIES)}"
    if row.shuffled and row.library not in TAKE_SHUFFLED:
        return f"{row.library} takes no shuffled weight, but the row says bpreshuffle True"
    if row.library != "asm":
        return ""
    if (tile := _ASM.search(row.kernel)) is None:
        return f"{row.kernel!r} is no assembly kernel for bf16"
    if ("shuffle" in row.kernel) != row.shuffled:
        kind = "shuffled" if "shuffle" in row.kernel else "plain"
        return f"{row.kernel} takes a {kind} weight, but the row says bpreshuffle {row.shuffled}"
    if row.k % 64:
        return f"the assembly kernels take K in multiples of 64, not {row.k}"
    if row.n % int(tile[2]):
        return f"{row.kernel} takes N in multiples of {tile[2]}, not {row.n}"
    if row.bias and "bf16gemm_bf16_" in row.kernel:
        return f"{row.kernel} adds no bias"
    split = min(row.split_k, 16, row.k // 64) > 1
    if split != ("_clean" in row.kernel):
        return f"{row.kernel} {'cannot split K' if split else 'must split K'}, but splitK is {row.split_k}"
    return ""


class TunedProducts:
    """The rows that this GPU can use for products of bf16 without scales.

    Raises UnsupportedError where a table has rows, but none for this GPU, and where rows name hipBLASLt's kernels by an
    index that belongs to another build of it than this one, `versions`. A table without rows has none for any shape.
    """

    def __init__(self, path: Path, gpu: Gpu, versions: dict[str, str]):
        rows = read_table(path)
        own = [row for row in rows if row.gpu == gpu]
        if rows and not own:
            found = " and ".join(sorted({str(row.gpu) for row in rows}))
            raise UnsupportedError(f"{path}: tuned for {found}; this is {gpu}")
        if indexed := [row for row in own if row.library == "hipblaslt"]:
            _check_sidecar(path, indexed[0].line, versions)
        self.rows = {
            (row.m, row.n, row.k, row.bias, row.shuffled): row
            for row in own
            if row.dtype == row.outdtype == "torch.bfloat16" and not row.scaled
        }

    def find(self, m: int, n: int, k: int, bias: bool, shuffled: bool) -> Row | None:
        """The row that aiter uses for a shape: of M itself, else of the next M that a table may have been tuned for."""
        for rows in (m, *padded_rows(m, n)):
            if (row := self.rows.get((rows, n, k, bias, shuffled))) is not None:
                return row
        return None


def padded_rows(m: int, n: int) -> tuple[int, int]:
    """M rounded up finely, then coarsely, as aiter does where M itself has no row (`getPaddedM`)."""
    step = 16 if m <= 256 else 32 if m <= 1024 else 64 if m <= 4096 else 128
    power = 1 << max(m - 1, 0).bit_length()
    return -(-m // step) * step, 8192 if m > 8192 and n > 4096 else power


def _check_sidecar(path: Path, line: int, versions: dict[str, str]) -> None:
    """hipBLASLt's solution indices mean something in the build they were found with, and there only."""
    sidecar = path.with_suffix(".json")
    where = f"{path}, line {line}: hipblaslt rows are valid for one build of hipBLASLt"
    try:
        tuned = json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{where}, and {sidecar} does not tell which: {error}") from error
    if tuned != versions or not all(versions.values()):
        raise UnsupportedError(f"{where}: {sidecar} says {tuned}, this machine has {versions}; tune here")
