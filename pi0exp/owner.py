"""Which process something belongs to, and whether that process still runs."""

import hashlib
import os
import re
import socket
import sys
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Self

import psutil

MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Owner:
    """host: its name. boot: id of the host's present start. space: of process ids, a container has one of its own.

    pid: the process. began: when it started, in clock ticks since the boot (elsewhere than on Linux in seconds).
    Together they are never given twice, as a pid alone is. machine: what of the host stays when it starts anew, while
    another one of the same name has another; "" where that is not known, and of owners that earlier versions wrote.
    """

    host: str
    boot: str
    space: str
    pid: str
    began: str
    machine: str = ""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What `str` made; None for anything else."""
        parts = text.split("+")
        return cls(*parts) if len(parts) in (5, 6) else None

    def __str__(self) -> str:
        return "+".join(astuple(self))

    def alive(self) -> bool | None:
        """None where this cannot be known from here: the process is on another host, or in another container.

        False for one of an earlier start of this host; of a host of the same name only if it is known to be this one.
        """
        here = this_process()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return False if self.machine and self.machine == here.machine else None
        if self.space != here.space:
            return None
        return self.began == _began(self.pid)


def this_process() -> Owner:
    return Owner(*_place(), str(os.getpid()), _began(str(os.getpid())), _machine())


@cache
def _place() -> tuple[str, str, str]:
    host = socket.gethostname().replace("+", "-").replace("/", "-")
    if sys.platform != "linux":
        return host, str(int(psutil.boot_time())), ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return host, boot, os.readlink("/proc/self/ns/pid").strip("pid:[]")


@cache
def _machine() -> str:
    """A digest of the id of this installation; "" where there is none, as in many containers.

    `man 5 machine-id` asks that the id itself leaves the machine nowhere.
    """
    try:
        text = MACHINE_ID.read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"pi0exp {text}".encode()).hexdigest()[:16] if re.fullmatch("[0-9a-f]{32}", text) else ""


def _began(pid: str) -> str:
    """When the process started; "" if there is none that runs."""
    try:
        if sys.platform != "linux":
            return str(int(psutil.Process(int(pid)).create_time()))
        # `man 5 proc_pid_stat`: the name before the last bracket may hold anything; field 3 is the state, 22 the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, psutil.Error):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
