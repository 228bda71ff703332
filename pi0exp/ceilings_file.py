"""Where measured ceilings are kept: one JSON file, by machine. Beside the local store, and whichever store a run has.

{"format": 1, "machines": {KEY: {"machine": what the rates belong to, "rates": {NAME: burst, sustained, at}}}}
"""

import fcntl
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from pi0exp.errors import UserError
from pi0exp.machine import ceilings_path
from pi0exp.root import default_root
from pi0exp.whole import put_whole

FRESH = timedelta(days=7)
"""How long rates are reused. Driver and libraries are part of what they belong to; what remains is a GPU's own ageing
and cooling, which a week does not hide."""


@dataclass(frozen=True)
class Rate:
    """Per second, bytes or FLOP: in short bursts, and sustained. at: when it was measured, ISO 8601 with its zone."""

    burst: float
    sustained: float
    at: str


def fresh(rate: Rate, now: datetime | None = None) -> bool:
    """Measured within the last week. A time in the future, of a wrong clock, is not."""
    age = (now or datetime.now(UTC)) - datetime.fromisoformat(rate.at)
    return timedelta(0) <= age <= FRESH


@dataclass(frozen=True)
class CeilingsFile:
    path: Path

    @classmethod
    def default(cls) -> Self:
        """`mlruns/ceilings.json` of the checkout, or what PI0EXP_CEILINGS names."""
        return cls(Path(ceilings_path() or default_root() / "ceilings.json"))

    def rates(self, owner: dict[str, Any]) -> dict[str, Rate]:
        """Name -> rate of this machine; empty where there are none. Raises UserError for a foreign file."""
        return self._rates(self._read(), owner)

    def keep(self, owner: dict[str, Any], rates: dict[str, Rate]) -> None:
        """Add rates, or put them in the place of older ones. Several processes may do so at once.

        Raises OSError where the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            machines = self._read()
            kept = {name: vars(rate) for name, rate in (self._rates(machines, owner) | rates).items()}
            machines[key_of(owner)] = {"machine": owner, "rates": kept}
            put_whole(self.path, json.dumps({"format": 1, "machines": machines}, indent=2).encode())

    def _read(self) -> dict[str, Any]:
        try:
            text = self.path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error
        try:
            content = json.loads(text)
            machines = content["machines"] if content["format"] == 1 else None
        except (ValueError, KeyError, TypeError):
            machines = None
        if not isinstance(machines, dict):
            raise UserError(f"{self.path} holds no ceilings of format 1: delete it, they are then measured again")
        return machines

    def _rates(self, machines: dict[str, Any], owner: dict[str, Any]) -> dict[str, Rate]:
        try:
            found = machines.get(key_of(owner), {"rates": {}})["rates"]
            rates = {name: Rate(**values) for name, values in found.items()}
            for rate in rates.values():
                datetime.fromisoformat(rate.at).astimezone()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is torn ({error}): delete it, ceilings are then measured again") from error
        return rates


def key_of(owner: dict[str, Any]) -> str:
    """16 hex digits."""
    return hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:16]
