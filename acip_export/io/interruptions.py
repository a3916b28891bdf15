"""Put Ctrl-C and other requests to end off while something must not be cut in two."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_REQUESTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Signals this close to each other are one request: a key that bounces, or a shell and a program that both pass it on.
_ONE_REQUEST_SECONDS = 1.0


class Interruption:
    """A handler that turns requests to end into KeyboardInterrupt; one that comes twice does not cut tidying up in two.

    Attributes:
        happened: whether one came: C code between here and whoever waits for the exception may replace it.
    """

    def __init__(self) -> None:
        self.happened, self._first = False, 0.0

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self.happened and time.monotonic() - self._first < _ONE_REQUEST_SECONDS:
            return
        self.happened, self._first = True, time.monotonic()
        raise KeyboardInterrupt


def ignore_requests() -> None:
    """Let nothing interrupt the process any more: it ends, and what Python does then takes no exception."""
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noted_interruptions() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C, SIGTERM and SIGHUP only be noted inside: the yielded function tells which came first, or 0, and a
    second one acts.

    One that comes at once behind the first is the same request. Signals that are ignored or end the process without
    Python stay as they are. Outside the main thread, where handlers cannot be set and none is called, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    noted: list[tuple[int, float]] = []
    handlers = {number: signal.getsignal(number) for number in _REQUESTS}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append((number, time.monotonic()))
        if len(noted) > 1 and noted[-1][1] - noted[0][1] >= _ONE_REQUEST_SECONDS:
            before[number](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noted[0][0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Act on an interruption of the block at its end, once everything in it is done: for blocks of milliseconds.

    Raises:
        KeyboardInterrupt: one came, unless whoever handles it outside the block only notes it, too.
    """
    with noted_interruptions() as interrupted:
        yield
    if number := interrupted():
        signal.raise_signal(number)
