"""Files that are there whole or not at all, whatever ends the process that writes them."""

import os
import tempfile
from pathlib import Path

from pi0exp.errors import UserError


def put_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are their owner's only
            os.replace(file.name, path)
        except BaseException:  # an interruption, too, must leave nothing behind
            os.unlink(file.name)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """The same for what a user asked for. Raises UserError."""
    try:
        put_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
