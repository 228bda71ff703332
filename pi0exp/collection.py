"""Python's search for cycles, kept away from imports, from samples, and from the end of a process.

PyTorch and MLflow make a million objects, none of them garbage. To look through them again and again while they are
imported takes a second of five, and to look through all of them when the process ends as much again.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Inside, Python looks for no cycles; afterwards as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def skip_at_exit() -> None:
    """Leave what is there at the end of the process to the system, which takes its memory back at once."""
    atexit.unregister(_freeze)
    atexit.register(_freeze)


def _freeze() -> None:
    # Triton's bindings call what is not looked through a leak, and print pages about it.
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()
