"""The name under which a measured point is found again: what was asked, on which machine, by which code."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pi0exp

_LINKED = ("kernels", "conf", "experiments")
"""Folders that are links in a checkout and plain folders in an installed package."""
_READERS = ("report", "search")
"""Folders of what reads results, or chooses what is measured, and takes no part in measuring."""
_SUFFIXES = (".py", ".csv", ".json")
"""Code, and the tables of tuned kernels that stand beside it."""


def point_key(experiment: dict[str, Any], machine: dict[str, Any]) -> str:
    """16 hex digits. Any change of the experiment, of the machine or of a line of code gives another key."""
    asked = json.dumps([experiment, machine], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{asked}\n{source_digest()}".encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; read once as long as the file is the same. Raises OSError."""
    found = path.stat()
    return _file_digest(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@cache
def _file_digest(path: Path, state: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def source_digest() -> str:
    """The digest of the code that this process runs; read once, so that an edit meanwhile does not change its keys."""
    return digest_sources(Path(pi0exp.__file__).parent)


def digest_sources(package: Path) -> str:
    """The digest over names and bytes of all sources of a package; the same in a checkout and where it is installed."""
    digest = hashlib.sha256()
    for name, path in sorted(_sources(package)):
        content = path.read_bytes()
        # The length keeps the end of one file and the beginning of the next apart.
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _sources(package: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to the package, file) of every source of the package and its kernels.

    The configuration is left out: composed, it is part of the experiment. os.walk and not Path.rglob: whether the
    latter enters linked folders depends on the version of Python; os.walk enters only the one it is started in.
    """
    for top, skipped in ((package, (*_LINKED, *_READERS)), (package / "kernels", ())):
        for folder, folders, files in os.walk(top, followlinks=False):
            if Path(folder) == top:
                folders[:] = [name for name in folders if name not in skipped]
            for file in files:
                path = Path(folder, file)
                if path.suffix in _SUFFIXES:
                    yield path.relative_to(package).as_posix(), path
