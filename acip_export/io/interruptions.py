"""Put Ctrl-C and other requests to end off while something must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_REQUESTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def noted_interruptions() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C, SIGTERM and SIGHUP only be noted inside: the yielded function tells it, and a second one acts.

    Signals that are ignored or end the process without Python stay as they are. Outside the main thread, where handlers
    cannot be set and none is called, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _REQUESTS}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            before[number](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Act on an interruption of the block at its end, once everything in it is done: for blocks of milliseconds.

    Raises:
        KeyboardInterrupt: one came.
    """
    with noted_interruptions() as interrupted:
        yield
    if interrupted():
        raise KeyboardInterrupt
