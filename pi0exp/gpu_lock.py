"""Never two measurements on one GPU at a time, whoever starts them on this host: a lock for each GPU.

A lock is a kernel file lock (flock) on a file named by the GPU's UUID. Its descriptor goes on to the measuring process,
and the kernel gives the lock back when the last process that has it is gone: a command that is killed leaves nothing
behind, and while its child still runs, the GPU stays taken. The files themselves stay, they mean nothing.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pi0exp import interrupts
from pi0exp.errors import UserError
from pi0exp.gpus import Gpu
from pi0exp.machine import gpu_locks_path, held_gpu, holding, kept_environment, set_environment, visible_gpus

FOLDER = Path("/tmp/pi0exp-gpu-locks")
"""One for the whole host: not what TMPDIR says, which differs between users and jobs."""
POLL_S = 0.2


@dataclass(frozen=True)
class Taken:
    """A GPU for one measurement. environment: leaves a process this GPU only, and tells it that it is taken.

    descriptors: to be passed on to that process. All empty where no GPU takes part.
    """

    uuid: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


@contextmanager
def taken(wanted: bool, tell: Callable[[str], None]) -> Iterator[Taken]:
    """Take a free GPU for a process that will be started; wait while there is none, and say so.

    Of the visible GPUs those equal to the first, whichever of them it is: the numbers are of their kind. wanted: False
    for a measurement on the CPU. Raises UserError where there is no place for the locks, and KeyboardInterrupt.
    """
    if not wanted or held_gpu() or not (visible := visible_gpus()):
        yield Taken()
        return
    equal = [gpu for gpu in visible if gpu.facts == visible[0].facts]
    gpu, descriptor = _first_free(equal, tell)
    try:
        yield Taken(gpu.uuid, gpu.pin | holding(gpu.uuid), (descriptor,))
    finally:
        os.close(descriptor)


@contextmanager
def taken_here(wanted: bool, tell: Callable[[str], None]) -> Iterator[None]:
    """The same for this very process, unless whoever started it holds a GPU for it. Before it opens a GPU context."""
    with taken(wanted, tell) as gpu, kept_environment():
        set_environment(gpu.environment)
        yield


def _first_free(gpus: list[Gpu], tell: Callable[[str], None]) -> tuple[Gpu, int]:
    """The GPU, and the descriptor that holds its lock."""
    folder, told = _folder(), False
    while True:
        for gpu in gpus:
            if (descriptor := _lock(folder / f"{gpu.uuid}.lock")) is not None:
                return gpu, descriptor
        if not told:
            tell(f"waits for a GPU: {', '.join(f'{gpu.uuid} is taken{_by(folder, gpu)}' for gpu in gpus)}")
            told = True
        with interrupts.allowed():
            time.sleep(POLL_S)


def _folder() -> Path:
    """Any user may make locks in it, and nobody may remove those of others. Raises UserError."""
    folder = Path(gpu_locks_path() or FOLDER)
    try:
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; PI0EXP_GPU_LOCKS names another folder for locks") from error
    return folder


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file; None where another process has the lock. Raises UserError."""
    try:
        descriptor = _open(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; PI0EXP_GPU_LOCKS names another folder for locks") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(descriptor), path.stat()
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):  # removed and made anew in between
        os.close(descriptor)
        return None
    with suppress(OSError):  # only to be told to those who wait
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _open(path: Path) -> int:
    """For users alike: a lock needs no right to write, and of a file that another user made there may be none.

    O_CREAT is tried last: Linux refuses it for files of others in a folder that all may write into.
    """
    for flags in (os.O_RDWR, os.O_RDONLY):
        with suppress(FileNotFoundError, PermissionError):
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:  # somebody was faster
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.fchmod(descriptor, 0o666)
    return descriptor


def _by(folder: Path, gpu: Gpu) -> str:
    """Who took it, as far as its file says."""
    with suppress(OSError, ValueError):
        return f" by process {int((folder / f'{gpu.uuid}.lock').read_text())}"
    return ""
