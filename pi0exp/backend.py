"""What stands under a store: MLflow itself, and its SQLite file or server.

The file is created once and whole. That it can be written, or a server be reached, is known before any measurement.
"""

import fcntl
import logging
import os
import sqlite3
import ssl
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pi0exp import collection
from pi0exp.errors import UserError
from pi0exp.machine import quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy.engine import URL

BUSY_S = 20.0
"""How long another process may hold the file; MLflow's own connections wait as long."""
CREATE_S = 120.0
"""How long another process may take to create it; two seconds are usual."""
REACH_S = 10.0
"""How long a tracking server may take for its first answer."""
ROOM_BYTES = 1 << 20
"""Room that must be left on the disk: a new store takes that much, a point a tenth of it."""


def import_mlflow() -> None:
    """Import MLflow without its messages, its progress bars and its reports to its makers."""
    quiet_mlflow()
    collection.skip_at_exit()
    with collection.paused():
        import mlflow  # noqa: F401  (sets up its loggers, which are quietened here)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs what SQL raises with the whole traceback, and raises it: `told` says it once, in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def reach(url: "URL") -> None:
    """Raise OSError where no server answers; MLflow would first repeat its request for four minutes."""
    # Whom to trust is for MLflow to decide; the system's certificates would take longer to read than all else here.
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    address = url._replace(username=None, password=None).render_as_string()
    try:
        urllib.request.urlopen(address, timeout=REACH_S, context=unverified).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer, even if not for this address


@contextmanager
def told(name: str) -> Iterator[None]:
    """Turn what MLflow, SQL or the file system raise into one line that names the store."""
    from mlflow import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        words = str(_database_error(error) or error) or type(error).__name__
        raise UserError(f"{name}: {words.splitlines()[0]}") from error


def _database_error(error: BaseException) -> BaseException | None:
    """What the database itself said, below what SQLAlchemy and MLflow made of it; None where it was not asked."""
    from sqlalchemy.exc import DBAPIError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DBAPIError) and cause.orig is not None:
            return cause.orig
        cause = cause.__cause__ or cause.__context__
    return None


def prepare(url: "URL", root: Path | None) -> Path:
    """Make sure that the file of a SQLite URL is an MLflow store that can be written; return the root of its files.

    root: where the files of runs go; None for the folder of the database.
    """
    with collection.paused():
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (the client would import it later)

    database = url.database or ""
    if url.query.get("uri"):  # SQLite's own form, with an encoding of its own
        database = urllib.parse.unquote(database.removeprefix("file:"))
    if database in ("", ":memory:") or url.query.get("mode") == "memory":
        raise UserError(f"{url.render_as_string()}: a store in memory is lost at the end; name a file")
    path = Path(database).absolute()
    root = root or path.parent
    for folder in {root, path.parent}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"{url.render_as_string()}: {folder} is a file where a folder must be") from error
        _write_probe(folder)
    # MLflow crashes where several processes create the tables of one file at once.
    with _locked(path.parent / ".lock"):
        if not path.exists():
            _create(path, root)
    _check(url)
    return root


@dataclass(frozen=True)
class Database:
    """The SQLite file under a store: path, and its device and inode when the store was opened."""

    path: Path
    identity: tuple[int, int]

    @classmethod
    def of(cls, url: "URL", client: "MlflowClient") -> Self:
        """The file behind a client that is about to be used.

        MLflow keeps connections for the life of a process. Those to a file that was deleted meanwhile would go on
        taking results, which nobody could ever read; they are closed.
        """
        database = url.database or ""
        if url.query.get("uri"):
            database = urllib.parse.unquote(database.removeprefix("file:"))
        found = cls(Path(database).absolute(), _identity(Path(database)))
        if _OPENED.setdefault(found.path, found.identity) != found.identity:
            client._tracking_client.store.engine.dispose()
            _OPENED[found.path] = found.identity
        return found

    def check(self) -> None:
        """Raises OSError where the file is no longer the one that was opened."""
        if not self.path.exists() or _identity(self.path) != self.identity:
            raise FileNotFoundError(f"{self.path} was deleted or replaced while a point was measured")


_OPENED: dict[Path, tuple[int, int]] = {}
"""Files that this process has connections to."""


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _write_probe(folder: Path) -> None:
    """Write and delete: neither the mode of a folder nor the user's rights say whether a write will succeed."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(ROOM_BYTES))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + CREATE_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for {CREATE_S:.0f} s") from None
                time.sleep(0.05)
        yield  # closing the file releases the lock


def _create(path: Path, root: Path) -> None:
    """Create the tables under another name first: a process killed meanwhile leaves no half store in the place."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import URL

    new = path.with_name(f".{path.name}.new")
    for leftover in (new, new.with_name(f"{new.name}-journal")):
        leftover.unlink(missing_ok=True)
    store = SqlAlchemyStore(URL.create("sqlite", database=str(new)).render_as_string(), root.as_uri())  # type: ignore[no-untyped-call]
    store.engine.dispose()
    new.replace(path)


def _check(url: "URL") -> None:
    """Open the file in the way that MLflow will, and change it."""
    # MLflow retries a file that cannot be opened for minutes, and would add its tables to a database of others.
    [file], options = url.get_dialect()().create_connect_args(url)
    with closing(sqlite3.connect(file, uri=bool(options.get("uri")), timeout=BUSY_S)) as connection:
        try:
            # Halves the time of a write, and lets others read meanwhile. Kept in the file.
            connection.execute("PRAGMA journal_mode = WAL")
            with connection:
                connection.execute("UPDATE alembic_version SET version_num = version_num")
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise sqlite3.DatabaseError(f"the file is no MLflow store ({error}); move it away") from error
            raise
