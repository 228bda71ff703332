"""The file of a gate: what the best stacks of a machine were measured to do."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi0exp import intervals
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.measure import fingerprint

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A stack of a baseline, and what its processes measured.

    words: of the command line. p50_ms: the median latency of each process. error: rel. L2 error of the actions of each.
    """

    words: list[str]
    p50_ms: list[float]
    error: list[float]


def read_baseline(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The machine's identity and the entries by name. Raises UserError that names the file."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"no baseline: no JSON object with format {FORMAT} (--update writes one)")
        entries = {str(name): Entry(**entry) for name, entry in found["points"].items()}
        for name, entry in entries.items():
            numbers = [*entry.p50_ms, *entry.error]
            if not all(isinstance(value, int | float) for value in numbers) or min(entry.p50_ms) <= 0:
                raise ValueError(f"{name}: what was measured is no list of numbers above 0")
            if len(entry.p50_ms) < intervals.PROCESSES or not entry.error:
                raise ValueError(f"{name}: fewer than {intervals.PROCESSES} processes")
        return dict(found["machine"]), entries
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; --update writes it") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a whole baseline: {error}") from error


def write_baseline(path: Path, machine: Machine, entries: dict[str, Entry]) -> None:
    """Whole or not at all."""
    points = {name: asdict(entry) for name, entry in entries.items()}
    body = {"format": FORMAT, "machine": machine.identity(), "fingerprint": fingerprint(machine), "points": points}
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def foreign(identity: dict[str, Any], machine: Machine) -> list[str]:
    """In what the machine of a baseline is another one. Versions may differ: what they change is to be found."""
    here = machine.identity()
    hardware = [name for name in {**identity, **here} if name not in ("versions", "driver")]
    return [
        f"{name} {identity.get(name, '-')}, here {here.get(name, '-')}"
        for name in hardware
        if identity.get(name) != here.get(name)
    ]
