"""Empty MLflow stores, copied: MLflow takes seconds for the tables of a new file, and a hundred tests would wait."""

import sqlite3
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

from pi0exp import backend

MADE_BY_MLFLOW = backend._create


@cache
def _tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        MADE_BY_MLFLOW(file, Path(folder))
        return file.read_bytes()


def copied(path: Path, root: Path) -> None:
    """For `pi0exp.backend._create`: the same file."""
    path.write_bytes(_tables())
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", [f"{root.as_uri()}/0"])


def laid(root: Path) -> None:
    """A store for a command that starts, in a folder that has none yet."""
    if root.is_dir() and not (root / "mlflow.db").exists():
        copied(root / "mlflow.db", root)
