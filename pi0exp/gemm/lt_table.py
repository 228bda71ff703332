"""Tables of cuBLASLt's algorithms: for each shape of a product the fastest that was found, and what it took.

A table is bound to an architecture and to a version of cuBLASLt, to which alone the numbers of an algorithm mean
something. Those in `tables/cublaslt_<architecture>.json` are made by `python -m pi0exp.gemm.lt_tune`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pi0exp.cublaslt import Algorithm
from pi0exp.errors import UserError
from pi0exp.gemm.lt_search import Found, Shape

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class LtTable:
    """arch: such as "sm_90". version: of cuBLASLt, 130100 for 13.1. about: what else is known, as GPU and date."""

    arch: str
    version: int
    about: Mapping[str, str]
    rows: Mapping[Shape, Found]

    def text(self) -> str:
        """What `read_table` reads: one line a shape."""
        head = {"arch": self.arch, "cublaslt": self.version, "about": dict(self.about)}
        rows = sorted(self.rows.items(), key=lambda item: tuple(asdict(item[0]).values()))
        lines = ",\n".join("  " + json.dumps(asdict(shape) | _cells(found)) for shape, found in rows)
        return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'

    def misfit(self, arch: str, version: int) -> str:
        """Why it is not for this machine; empty if it is."""
        if (self.arch, self.version) == (arch, version):
            return ""
        return f"made for {self.arch} and cuBLASLt {self.version}; here are {arch} and cuBLASLt {version}"


def _cells(found: Found) -> dict[str, Any]:
    return asdict(found) | {"us": round(found.us, 3), "first_us": round(found.first_us, 3)}


def shipped(arch: str) -> Path:
    """Where the table of an architecture is, if there is one."""
    return TABLES / f"cublaslt_{arch}.json"


def read_table(path: Path) -> LtTable:
    """Raises UserError, one line that names the file."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"gemm.table {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"gemm.table {path} is no table of cuBLASLt's algorithms: {error}") from error
    try:
        rows = [_row(cells) for cells in stored["rows"]]
        table = LtTable(str(stored["arch"]), int(stored["cublaslt"]), dict(stored["about"]), dict(rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"gemm.table {path} is no table of cuBLASLt's algorithms: {reason}") from error
    if len(table.rows) != len(rows):
        raise UserError(f"gemm.table {path} has two rows for one shape")
    return table


def _row(cells: dict[str, Any]) -> tuple[Shape, Found]:
    shape = Shape(int(cells["M"]), int(cells["N"]), int(cells["K"]), bool(cells["bias"]))
    algorithm = Algorithm(*(int(cells["algorithm"][field.name]) for field in fields(Algorithm)))
    return shape, Found(algorithm, float(cells["us"]), float(cells["first_us"]), int(cells["tried"]))
