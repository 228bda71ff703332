"""The file of a gate: what the best stacks of a machine were measured to do."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi0exp import intervals
from pi0exp.errors import UserError
from pi0exp.load import try_folder
from pi0exp.machine import Machine

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A stack of a baseline, and what its processes measured.

    words: of the command line. p50_ms: the median latency of each process. error: rel. L2 error of the actions of each.
    fingerprint: of the machine, the versions and the code that measured it.
    """

    words: list[str]
    p50_ms: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.words)

    @property
    def stack(self) -> str:
        return self.words[0].removeprefix("stack=")


def name_of(words: Sequence[str]) -> str:
    """The stack, then what is composed with it: one stack stands in a baseline once for each workload."""
    return " ".join(words).removeprefix("stack=")


def read_baseline(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The machine's identity and the entries by name. Raises UserError that names the file."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("format") != FORMAT or "points" not in found:
            raise ValueError(f"no JSON object with format {FORMAT} and points (--update writes one)")
        entries = [Entry(**entry) for entry in found["points"].values()]
        if not entries:
            raise ValueError("it holds no points")
        for entry in entries:
            _check(entry)
        return dict(found["machine"]), {entry.name: entry for entry in entries}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; --update writes it") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole baseline: {error}") from error


def _check(entry: Entry) -> None:
    """Raises ValueError. A number that is none would compare as no regression."""
    words = entry.words
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"words is {words!r}; it must be a list of words of the command line")
    if not words[0].startswith("stack="):
        raise ValueError(f"words begin with {words[0]!r}; stack=NAME comes first")
    if not isinstance(entry.fingerprint, dict):
        raise ValueError(f"{entry.name}: fingerprint must be an object")
    for name, values, least in (("p50_ms", entry.p50_ms, "above 0"), ("error", entry.error, "0 or more")):
        if not isinstance(values, list) or len(values) < intervals.PROCESSES:
            raise ValueError(f"{entry.name}: {name} must list {intervals.PROCESSES} processes or more")
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name == "p50_ms"):
                raise ValueError(f"{entry.name}: {name} holds {value!r}; it must be {least}")


def write_baseline(path: Path, machine: Machine, entries: dict[str, Entry]) -> None:
    """Whole or not at all."""
    points = {name: asdict(entry) for name, entry in entries.items()}
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(
            json.dumps({"format": FORMAT, "machine": machine.identity(), "points": points}, indent=1) + "\n"
        )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def try_baseline(path: Path) -> None:
    """Raises UserError where it could not be written; after minutes of measuring would be too late."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a baseline is a file")
    try_folder(path.parent)


def foreign(identity: dict[str, Any], machine: Machine) -> list[str]:
    """In what the machine of a baseline is another one. Versions may differ: what they change is to be found."""
    here = machine.identity()
    hardware = [name for name in {**identity, **here} if name not in ("versions", "driver")]
    return [
        f"{name} {identity.get(name, '-')}, here {here.get(name, '-')}"
        for name in hardware
        if identity.get(name) != here.get(name)
    ]


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of driver, versions and code is not as it was, in two fingerprints: where to look for a reason."""
    sides = [
        {name: str(one[name]) for name in ("driver", "cuda", "hip", "commit", "dirty") if name in one}
        | {name: str(version) for name, version in one.get("versions", {}).items()}
        for one in (before, now)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [
        f"{name} {sides[0].get(name, '-')} -> {sides[1].get(name, '-')}"
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]
