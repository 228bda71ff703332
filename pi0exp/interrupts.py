"""Ctrl-C and requests to end, let in only where they can be dealt with: while the measuring process is waited for."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


@dataclass
class _State:
    """held: whether a signal must wait. pending: what came meanwhile. last: what came last, waiting or not."""

    held: bool = False
    pending: str = ""
    last: str = ""


_state = _State()


def install() -> None:
    """Make each of `SIGNALS` a KeyboardInterrupt that names it, except where the caller has it ignored (nohup)."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = _state.last = SIGNALS[signal.Signals(number)]
    if not _state.held:
        raise KeyboardInterrupt(name)
    _state.pending = name


def cause(error: KeyboardInterrupt) -> str:
    """What interrupted. Libraries that wait in C, as Ray does, raise an interrupt of their own, which has no name."""
    return str(error) or _state.last or SIGNALS[signal.SIGINT]


@contextmanager
def held() -> Iterator[None]:
    """Inside, a signal waits until the end or for `allowed`: a run is opened and closed whole, a child is not lost."""
    before, _state.held = _state.held, True
    try:
        yield
    finally:
        _state.held = before
        if not before:
            _raise_pending()


@contextmanager
def allowed() -> Iterator[None]:
    """Inside `held`, the place where signals are let in, also one that came before."""
    before, _state.held = _state.held, False
    try:
        _raise_pending()
        yield
    finally:
        _state.held = before


def _raise_pending() -> None:
    name, _state.pending = _state.pending, ""
    if name:
        raise KeyboardInterrupt(name)
