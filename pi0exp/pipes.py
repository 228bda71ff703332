"""Commands whose output is read by another one: `python -m pi0exp.machine | head` ends quietly once nobody reads."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

CLOSED = 128 + signal.SIGPIPE
"""The exit code that a shell gives to a command that SIGPIPE ended."""


def leave(main: Callable[[], int]) -> NoReturn:
    """Exit with what the command returns, or with `CLOSED` where its reader was gone before.

    Not SIGPIPE's default action: it would end the process in the middle, with children and files as they are.
    """
    try:
        try:
            code: int | str | None = main()
        except SystemExit as error:  # what a parser ends with
            code = error.code
        sys.stdout.flush()
    except BrokenPipeError:
        # Or the interpreter flushes once more, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED
    sys.exit(code)
