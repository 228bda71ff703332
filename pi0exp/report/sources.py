"""Where records come from: the committed result files, and MLflow, into which those go first.

The user's own store is read and never written: what it lacks of the committed files goes into a store of its own in a
temporary folder, which is read the same way and removed.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pi0exp.known import RESULTS
from pi0exp.load import SUFFIXES, gpu_slug, read_record
from pi0exp.operands import open_store
from pi0exp.result import measured_at
from pi0exp.track import Record, Store

Measured = dict[str, dict[str, list[Record]]]
"""Study -> GPU, as a folder is called -> its records in the order in which they were measured, as far as they say it.

Of those of a day that have no time, committed ones come first, by name, then the store's, the first one first.
"""


def committed(names: Iterable[str] | None = None, results: Path = RESULTS) -> Measured:
    """The result files of these studies, of all without names. Raises UserError for a file that is no result."""
    folders = sorted(folder for folder in results.iterdir() if folder.is_dir()) if results.is_dir() else []
    chosen = [folder for folder in folders if names is None or folder.name in names]
    files = (file for folder in chosen for file in sorted(folder.rglob("*")) if file.name.endswith(SUFFIXES))
    return sorted_out(read_record(file) for file in files)


def tracked(names: Iterable[str] | None, uri: str | None, root: Path | None, results: Path = RESULTS) -> Measured:
    """What MLflow has of these studies, of all without names, once the committed results are in. Raises UserError."""
    names = None if names is None else list(names)
    mine = open_store(uri, root)
    own = [] if mine is None else _runs(mine, names)
    there = {_text(record) for record in own}
    files = [one for of in committed(names, results).values() for some in of.values() for one in some]
    missing = [record for record in files if _text(record) not in there]
    brought: list[Record] = []
    if missing:
        with tempfile.TemporaryDirectory(prefix="pi0exp-report-") as folder:
            store = Store.open(root=Path(folder))
            for record in missing:
                store.import_record(record)
            brought = _runs(store, names)
    return sorted_out([*brought, *own])


def sorted_out(records: Iterable[Record]) -> Measured:
    found: Measured = {}
    for record in sorted(records, key=measured_at):
        gpu = gpu_slug(str(record["fingerprint"].get("gpu") or "cpu"))
        found.setdefault(record["study"], {}).setdefault(gpu, []).append(record)
    return found


def _runs(store: Store, names: list[str] | None) -> list[Record]:
    """The first one first. Interrupted ones hold no result."""
    studies = [name for name in store.studies() if names is None or name in names]
    runs = [stored.record for name in studies for stored in reversed(store.runs(name))]
    return [record for record in runs if record["outcome"] != "interrupted"]


def _text(record: Record) -> str:
    return json.dumps(record, sort_keys=True)
