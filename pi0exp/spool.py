"""Results on their way into the store: each is a file before it is a run, so that neither is ever lost.

A result is written beside the store first, then logged, then the file goes. Where the store was lost meanwhile (full,
locked, read-only, deleted, its server gone), or the command was killed, the file stays, and the next start brings it
in. Room for it is taken before the measurement: on a disk that fills up meanwhile the result still has its place.
"""

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pi0exp.errors import UserError
from pi0exp.owner import Owner, this_process

ROOM_BYTES = 1 << 20
"""Taken on the disk while a point is measured; a result with 1000 samples is 40 kB."""
UNKNOWN_S = 600.0
"""A file of a process that cannot be seen from here is taken over when it is this old; logging takes seconds."""

_TOLD: set[Path] = set()
"""Files that cannot be brought in: told once, not at every point of a sweep."""


class Spool:
    """Results that are not in the store yet, as `RUN+OWNER.json`, and room that is kept for the next, `.OWNER.room`.

    folders: beside the store; and one to fall back to where that has become read-only or was lost.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._room: Path | None = None

    @property
    def waiting(self) -> list[Path]:
        """Files whose process is gone, or is this one, which is not logging them now."""
        return [path for folder in self._folders for path in _waiting(folder)]

    @contextmanager
    def room(self) -> Iterator[None]:
        """Within it there is room for one result. Raises UserError where there is none: later would be too late."""
        folder = self._folders[0]
        self._room = folder / f".{this_process()}.room"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._clear(folder)
            with self._room.open("wb") as file:
                file.write(bytes(ROOM_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._release()
            raise UserError(f"{folder}: {error.strerror or error}; results must have room there") from error
        try:
            yield
        finally:
            self._release()

    def keep(self, run_id: str, record: dict[str, Any]) -> Path:
        """Write the result of a run. Raises UserError where no folder takes it."""
        content, name, told = json.dumps(record).encode(), f"{run_id}+{this_process()}.json", ""
        if self._room is not None:
            with suppress(OSError):
                return _written(self._room, content, self._folders[0] / name)
        for folder in self._folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                return _written(folder / f".{this_process()}.part", content, folder / name)
            except OSError as error:
                told = f"{folder}: {error.strerror or error}"
        raise UserError(f"{told}; the result of run {run_id} is lost")

    def _release(self) -> None:
        """Give back the room, if it is still there."""
        if self._room is not None:
            with suppress(OSError):
                self._room.unlink()
        self._room = None

    def bring_in(self, take: Callable[[str, Path], None]) -> None:
        """Call `take(run id, file)` for each waiting result, then remove the file. What it refuses is told, and stays.

        One process at a time in a folder: two that begin together would each log them. A folder without any is not
        locked: it may have become unusable. Raises UserError where results wait in one that cannot be written, from
        which they could not be removed.
        """
        for folder in self._folders:
            try:
                if _waiting(folder):
                    with _alone(folder):
                        _take_all(folder, take)
            except OSError as error:
                raise UserError(
                    f"{folder}: {error.strerror or error}; results that wait there cannot be brought into the store"
                ) from error
            with suppress(OSError):  # of a folder that is unusable and holds no result
                self._clear(folder)

    def _clear(self, folder: Path) -> None:
        """Remove what processes that are gone had reserved or begun to write."""
        for path in (*folder.glob(".*.room"), *folder.glob(".*.part")):
            if _abandoned(path, path.name.removeprefix(".").rpartition(".")[0]):
                path.unlink(missing_ok=True)


def _written(target: Path, content: bytes, final: Path) -> Path:
    """Write into `target`, over the room that it has, and give it its name: the file is there whole or not at all."""
    with target.open("r+b" if target.exists() else "wb") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    os.replace(target, final)
    return final


def _waiting(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json"))
    return [path for path in found if _abandoned(path, *path.name.removesuffix(".json").split("+", 1)[1:])]


def _take_all(folder: Path, take: Callable[[str, Path], None]) -> None:
    for path in _waiting(folder):
        try:
            take(path.name.split("+", 1)[0], path)
        except UserError as error:
            if path not in _TOLD:
                _TOLD.add(path)
                print(f"pi0exp: {path} cannot be brought into the store: {error}", file=sys.stderr)
        else:
            path.unlink(missing_ok=True)


def _abandoned(path: Path, owner: str = "") -> bool:
    """Whether the process that wrote the file does not need it."""
    found = Owner.parse(owner)
    if found is None:
        return False  # none of ours
    if found == this_process():
        return True
    alive = found.alive()
    if alive is None:
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > UNKNOWN_S
    return alive is False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folders(root: Path, uri: str, own: bool) -> tuple[Path, Path]:
    """Where results of a store wait: beside it, and on the disk of temporary files where that takes none.

    root: of the store's files, or a local folder where it is a server. own: the root holds no other store.
    """
    name = hashlib.sha256(f"{root} {uri}".encode()).hexdigest()[:16]
    beside = root / ".spool"
    return beside if own else beside / name, Path(tempfile.gettempdir(), f"pi0exp-spool-{os.getuid()}", name)
