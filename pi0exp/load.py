"""Result files: write a measured point to a file, and bring the files of others into the local store.

python -m pi0exp.load experiments/results/ladder
"""

import argparse
import gzip
import json
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi0exp import pipes
from pi0exp.errors import UserError
from pi0exp.result import CONFIG_ERROR, Outcome, Result, record
from pi0exp.track import NAME, Record, Store
from pi0exp.whole import write_whole

SUFFIXES = (".json", ".json.gz")
PLAIN_BYTES = 1_000_000
"""Larger files are compressed; smaller ones can be read in a review."""

_NEEDED = ("key", "study", "experiment", "outcome", "params", "metrics", "samples", "fingerprint")
_TEXTS = ("key", "study", "outcome", "numerics", "log")
_OBJECTS = ("experiment", "params", "metrics", "samples", "fingerprint", "facts", "applied", "files")


def gpu_slug(gpu: str) -> str:
    """The name of a GPU as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def write_record(record: Record, directory: Path) -> Path:
    """Write `<directory>/<study>/<gpu>/<key>.json`, or `.json.gz` if it is large. The file is there whole or not."""
    folder = directory / record["study"] / gpu_slug(str(record["fingerprint"].get("gpu") or "cpu"))
    # One line a field: short enough to read, and a change shows which field it is in.
    fields = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    content = f"{{\n{fields}\n}}\n".encode()
    chosen, other = SUFFIXES
    if len(content) > PLAIN_BYTES:
        content = gzip.compress(content, mtime=0)  # the same record, the same bytes
        chosen, other = other, chosen
    path: Path = folder / f"{record['key']}{chosen}"
    write_whole(path, content)
    try:
        (folder / f"{record['key']}{other}").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path


def settled_file(directory: Path, study: str, key: str) -> tuple[Path, Record] | None:
    """The file of a point that need not be repeated, with its result. One that cannot be read is told, and is none."""
    # In whichever folder: the key knows the machine.
    files = [file for suffix in SUFFIXES for file in sorted((directory / study).glob(f"*/{key}{suffix}"))]
    return next(((path, one) for path, one in readable(files) if Outcome(one["outcome"]).settled), None)


def try_folder(directory: Path) -> None:
    """Raises UserError where `write_record` could not write; after a measurement would be too late."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror or error}") from error


def read_record(path: Path) -> Record:
    """The record in a result file, complete and checked; anything else is a UserError that names the file."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.name.endswith(".gz") else content).decode()
        if not text.strip():
            raise ValueError("the file is empty")
        return _checked(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a whole result file: {error}") from error
    except OSError as error:  # gzip says with it that a file is not compressed
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error


def _checked(found: Any) -> Record:
    if not isinstance(found, dict) or found.get("format") != 1:
        raise ValueError("not a result file: no JSON object with format 1")
    if missing := [name for name in _NEEDED if name not in found]:
        raise ValueError(f"not a whole result: {', '.join(missing)} missing")
    given = {name: value for name, value in found.items() if name != "format"}
    if foreign := given.keys() - {*_TEXTS, *_OBJECTS, "reasons"}:
        raise ValueError(f"unknown field {', '.join(sorted(foreign))}")
    for name, value in given.items():
        if not _fits(name, value):
            raise ValueError(f"{name} is not what a result holds there: {json.dumps(value)[:80]}")
    if given["outcome"] not in set(Outcome):
        raise ValueError(f"outcome={given['outcome']!r}: one of {', '.join(Outcome)} is known")
    key, study, params, experiment = (given.pop(name) for name in ("key", "study", "params", "experiment"))
    return record(key, study, params, experiment, Result(**given))


def _fits(name: str, value: Any) -> bool:
    """Whether a field has the type, and a name the form, that the store relies on."""
    match name:
        case "key":
            return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None
        case "study":
            return isinstance(value, str) and NAME.fullmatch(value) is not None
        case "reasons":
            return _texts(value)
        case _ if name in _TEXTS:
            return isinstance(value, str)
        case _ if not isinstance(value, dict):
            return False
        case "params" | "facts":
            return _texts(list(value.values()))
        case "files":  # their names become names of files in the store
            return _texts(list(value.values())) and all(NAME.fullmatch(name) for name in value)
        case "applied":
            return all(_texts(one) for one in value.values())
        case "metrics":
            return _numbers(list(value.values()))
        case "samples":
            return all(_numbers(one) for one in value.values())
    return True


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _numbers(value: Any) -> bool:
    """Integers too large for a float, which JSON can write, are no measurement."""
    return isinstance(value, list) and all(
        isinstance(one, float) or (isinstance(one, int) and not isinstance(one, bool) and abs(one) < 2**63)
        for one in value
    )


def load(paths: list[Path], uri: str | None = None, root: Path | None = None) -> None:
    """Bring result files into a store and say so, a line a file. Every file is checked before the first goes in."""
    records = {path: read_record(path) for path in result_files(paths)}
    first: dict[tuple[str, str], Path] = {}
    for path, one in records.items():
        other = first.setdefault((one["study"], one["key"]), path)
        if json.dumps(records[other], sort_keys=True) != json.dumps(one, sort_keys=True):
            raise UserError(f"{path}: another result under the key of {other}; load one of them")
    store = Store.open(uri, root)
    recover(store, *sorted({one["study"] for one in records.values()}))
    for path, one in records.items():
        with _named(path):
            store.find(one)
    new = 0
    for path, one in records.items():
        with _named(path):
            _, created = store.import_record(one)
        new += created
        print(f"{'loaded' if created else 'already there'}: {path} ({one['study']}, {one['outcome']})", flush=True)
    print(f"{len(records)} file{'s' * (len(records) != 1)}: {new} loaded, {len(records) - new} already there")


def recover(store: Store, *studies: str) -> None:
    """Take up what commands that were killed left in a store: results that wait for it, then runs without a result.

    In this order: a run whose result waits is not torn. Raises UserError.
    """
    store.spool.bring_in(lambda run_id, path: _bring_in(store, run_id, path))
    for study in studies:
        store.mark_torn(study)


def _bring_in(store: Store, run_id: str, path: Path) -> None:
    """Log the result that waits in a file of the spool. Raises UserError."""
    store.complete(run_id, read_record(path))
    print(f"pi0exp: {path} was brought into the store", file=sys.stderr, flush=True)


def load_each(paths: list[Path], uri: str | None = None, root: Path | None = None) -> None:
    """The same file by file: what does not go in is told on stderr and left out, and keeps no other one from going in.

    A point that the store has settled is already there, whatever its file says.
    """
    store = Store.open(uri, root)
    counts = Counter[str]()
    found = list(readable(paths))
    recover(store, *sorted({one["study"] for _, one in found}))
    for path, one in found:
        if store.settled(one["study"], one["key"]) is not None:
            counts["already there"] += 1
            continue
        try:
            with _named(path):
                _, created = store.import_record(one)
        except UserError as error:
            _leave_out(error)
            continue
        counts["loaded" if created else "already there"] += 1
    print(f"{counts.total()} files: {counts['loaded']} loaded, {counts['already there']} already there")


def readable(paths: list[Path]) -> Iterator[tuple[Path, Record]]:
    """The results in these files and folders; a file that holds none is told on stderr and left out."""
    for file in (file for path in paths for file in (files_in(path) if path.is_dir() else [path])):
        try:
            yield file, read_record(file)
        except UserError as error:
            _leave_out(error)


def _leave_out(error: UserError) -> None:
    print(f"left out: {error}", file=sys.stderr, flush=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def result_files(paths: list[Path]) -> Iterator[Path]:
    """These files, and those in these folders. Raises UserError for a folder without any."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        if not (inside := files_in(path)):
            raise UserError(f"{path}: no result file ({', '.join(SUFFIXES)}) in this folder")
        yield from inside


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.name.endswith(SUFFIXES))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.load",
        description="Bring result files measured elsewhere into the local MLflow store. A file is loaded only once.",
        epilog="example: python -m pi0exp.load experiments/results && make ui\n\n"
        "exit codes: 0; 2 a file that is no result, or a store that cannot be written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result file, or folder searched for them")
    parser.add_argument(
        "--each", action="store_true", help="file by file: leave out what is no result, and what the store has settled"
    )
    parser.add_argument("--uri", help="MLflow tracking URI; default: the SQLite store in the root")
    parser.add_argument("--root", type=Path, help="folder of the store; default: mlruns of the repository")
    given = parser.parse_args(arguments)
    try:
        (load_each if given.each else load)(given.files, given.uri, given.root)
    except UserError as error:
        print(f"pi0exp: {error}", file=sys.stderr)
        return CONFIG_ERROR
    return 0


if __name__ == "__main__":
    pipes.leave(main)
