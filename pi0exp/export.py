"""A study as a table for other tools:  python -m pi0exp.export STUDY --format csv

One row a finished run. csv and parquet: outcome, parameters, metrics, machine; json: whole records, samples included.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pi0exp import pipes
from pi0exp.errors import UserError
from pi0exp.operands import open_store, store_name
from pi0exp.result import CONFIG_ERROR
from pi0exp.track import Stored

FORMATS = ("csv", "parquet", "json")
EPILOG = """examples:
  python -m pi0exp.export ladder --format csv > ladder.csv
  python -m pi0exp.export ladder --format parquet --out ladder.parquet

Columns: run_id, study, key, outcome, reasons, numerics; params.*, metrics.*, machine.*, facts.* by their names. What a
run has not is empty. parquet also has lists of samples, samples.*; it needs pip install 'pi0exp[parquet]'. In json
a number that is not finite is null.

exit codes: 0 written; 2 no such study or store, or a file that cannot be written."""


def row(stored: Stored) -> dict[str, Any]:
    """A record as one row without nesting; parts of the fingerprint that are no single value are flattened."""
    record = stored.record
    fields: dict[str, Any] = {"run_id": stored.run_id}
    fields |= {name: record[name] for name in ("study", "key", "outcome")}
    fields |= {"reasons": "\n".join(record["reasons"]), "numerics": record["numerics"]}
    parts = {"params": record["params"], "metrics": record["metrics"], "machine": record["fingerprint"]}
    for name, part in (parts | {"facts": record["facts"]}).items():
        fields |= dict(_flat(part, f"{name}."))
    # One type a column: JSON may have written the integer 20 for the metric 20.0.
    return {name: float(value) if name.startswith("metrics.") else value for name, value in fields.items()}


def _flat(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if prefix.startswith("metrics.") else str(value)


def as_csv(found: list[Stored]) -> bytes:
    """The header has every column that some row has, in the order of their first appearance."""
    rows = [row(stored) for stored in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for one in rows for name in one)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_json(found: list[Stored]) -> bytes:
    """A list of records in the form of result files, each with its run_id. JSON has no word for NaN and infinity."""
    records = [{"run_id": stored.run_id, **_finite(stored.record)} for stored in found]
    return (json.dumps(records, indent=1, allow_nan=False) + "\n").encode()


def _finite(node: Any) -> Any:
    """The same with None for each number that is not finite."""
    if isinstance(node, dict):
        return {name: _finite(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def as_parquet(found: list[Stored]) -> bytes:
    """Raises UserError where pyarrow is not installed."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"parquet needs pyarrow ({error}): pip install 'pi0exp[parquet]'") from error
    rows = [
        row(stored) | {f"samples.{name}": list(map(float, taken)) for name, taken in stored.record["samples"].items()}
        for stored in found
    ]
    columns = list(dict.fromkeys(name for one in rows for name in one))
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table({name: [one.get(name) for one in rows] for name in columns}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def export(study: str, form: str, out: Path | None, uri: str | None, root: Path | None) -> None:
    """Write the finished runs of a study, the first one first, to a file or stdout. Raises UserError."""
    if form == "parquet" and out is None and sys.stdout.isatty():
        raise UserError("parquet is no text for a terminal: name a file with --out")
    store, place = open_store(uri, root), store_name(uri, root)
    if store is None:
        raise UserError(f"{place}: there is no store; measure something, or name one with --root or --uri")
    if study not in (names := store.studies()):
        raise UserError(f"{study}: no such study in {place}; there are {', '.join(names)}")
    found = list(reversed(store.runs(study)))
    if not found:
        raise UserError(f"{study}: no finished run in {place}")
    content = {"csv": as_csv, "json": as_json, "parquet": as_parquet}[form](found)
    if out is None:
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except OSError as error:
            raise UserError(f"stdout: {error.strerror or error}") from error
        return
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    print(f"{out}: {len(found)} run{'s' * (len(found) != 1)} of {study}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.export",
        description="Write the finished runs of a study as a table or as records.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help="its name in MLflow")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to; default: stdout")
    parser.add_argument("--uri", help="MLflow tracking URI; default: the SQLite store in the root")
    parser.add_argument("--root", type=Path, help="folder of the store; default: mlruns of the repository")
    given = parser.parse_args(arguments)
    try:
        export(given.study, given.format, given.out, given.uri, given.root)
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    return 0


if __name__ == "__main__":
    pipes.leave(main)
