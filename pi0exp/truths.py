"""Truths that stacks are held against, kept between the points of a sweep.

The truth of a point is what the plain model computes in wider arithmetic (`pi0exp.verify`); it depends on the model,
its weights and the inputs, not on the stack, and takes seconds of each point. It is taken from here only where all that
it could depend on is the same: every source of this package, the machine with its driver and libraries, model, seed of
the weights, precision, and each byte of the inputs.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pi0exp.ceilings_file import CeilingsFile
from pi0exp.errors import UserError
from pi0exp.key import source_digest
from pi0exp.machine import Machine
from pi0exp.whole import put_whole
from pi0exp.workload import HostInput

FORMAT = 1


@dataclass(frozen=True)
class Truth:
    """actions: float [B, horizon, A] on the host, one for each input. at: when they were computed, ISO 8601."""

    actions: list[Tensor]
    at: str


@dataclass(frozen=True)
class TruthFolder:
    """One file a truth, KEY.pt."""

    path: Path

    @classmethod
    def default(cls) -> Self:
        """`truths/` beside the measured ceilings."""
        return cls(CeilingsFile.default().path.parent / "truths")

    def find(self, key: str) -> Truth | None:
        """Raises UserError where the file holds something else."""
        file = self.path / f"{key}.pt"
        if not file.is_file():
            return None
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            if content["format"] != FORMAT or content["key"] != key:
                raise ValueError(f"format {content['format']}, key {content['key']}")
            return Truth(list(content["actions"]), str(content["at"]))
        except Exception as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{file} is no truth ({why}): delete it, it is then computed again") from error

    def keep(self, key: str, actions: Sequence[Tensor]) -> None:
        """Raises OSError where the file cannot be written."""
        at, content = datetime.now(UTC).isoformat(timespec="seconds"), io.BytesIO()
        torch.save({"format": FORMAT, "key": key, "actions": list(actions), "at": at}, content)
        put_whole(self.path / f"{key}.pt", content.getvalue())


def key_of(machine: Machine, what: Any, inputs: Sequence[HostInput]) -> str:
    """what: all else that the truth depends on, of things whose repr tells them apart."""
    digest = hashlib.sha256(f"{source_digest()}\n{json.dumps(machine.identity(), sort_keys=True)}\n{what!r}".encode())
    for item in inputs:
        for name, value in vars(item).items():
            arrays = value if isinstance(value, dict) else {"": value}
            for part, array in arrays.items():
                digest.update(f"\n{name} {part} {array.dtype} {array.shape}\n".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def kept(folder: TruthFolder, key: str, compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], str]:
    """The truth of this key, found or computed and kept; and in words which of the two."""
    found = folder.find(key)
    if found is not None:
        return found.actions, f"of {found.at}, of the same code, machine, weights and inputs"
    actions = compute()
    try:
        folder.keep(key, actions)
    except OSError as error:
        return actions, f"computed in this run; not kept: {error.strerror} ({folder.path})"
    return actions, "computed in this run"
