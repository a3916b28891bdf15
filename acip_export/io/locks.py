"""A lock on an output: of two processes that write the same, the second is told which is the first.

The lock is the system's, on a hidden file beside the output, and goes with its process, however that ends; what the
file says is for people. Of several processes that were launched together, the first holds it for all.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from acip_export.errors import OutputError, UsageError
from acip_export.io.interruptions import interrupted_afterwards

_LONGEST_NAME = 200
_ours: dict[Path, int] = {}
_one_at_a_time = threading.Lock()


@contextmanager
def held(place: Path) -> Iterator[bool]:
    """Hold the lock of an output inside; a process that has it already has it again.

    Yields:
        Whether the lock is new: whatever lies around the place is then of processes that are gone.

    Raises:
        UsageError: another process has it. OutputError: there is no place for it.
    """
    stream, counted = None, False
    try:
        # Between the file and what is known of it here, nobody would remove it.
        with interrupted_afterwards(), _one_at_a_time:
            stream = None if _ours.get(place) or _follows() else _locked(place, leave=True)
            _ours[place] = _ours.get(place, 0) + 1
            counted = True
        yield stream is not None
    finally:
        if counted:
            with interrupted_afterwards(), _one_at_a_time:
                _ours[place] -= 1
                if not _ours[place]:
                    del _ours[place]
                if stream is not None:
                    with suppress(OSError):
                        _file(place).unlink()
                    stream.close()


def refuse_held(place: Path) -> None:
    """Raises UsageError if another process writes ``place`` now."""
    if _ours.get(place) or _follows() or not _file(place).exists():
        return
    stream = _locked(place, leave=False)
    if stream is not None:
        stream.close()


def _follows() -> bool:
    """Tell whether this process was launched with others and is not the first, as torch and accelerate say it."""
    return os.environ.get("RANK", "0") != "0"


def _file(place: Path) -> Path:
    return place.parent / f".{place.name[:_LONGEST_NAME]}.lock"


def _locked(place: Path, leave: bool) -> BinaryIO | None:
    """Take the lock; ``None`` where the system has none. ``leave``: say in the file who has it."""
    file = _file(place)
    try:
        import fcntl
    except ImportError:  # Windows, where the renames at the end refuse a file that is open
        return None
    while True:
        try:
            if leave:
                file.parent.mkdir(parents=True, exist_ok=True)
            # Not through a link that somebody else has put there.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if leave else 0)
            descriptor = os.open(file, flags, 0o600)
        except OSError as reason:
            if not leave:
                return None  # gone, or not ours to read; what writes finds out
            raise OutputError(
                f"{place} cannot be written: {reason.strerror}; nothing was left there. "
                "Make room, or choose another place with -o"
            ) from reason
        stream = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = stream.read(200).decode("utf-8", "replace").strip()
            stream.close()
            raise UsageError(
                f"{place} is being written by another acip-export ({other or 'which has just started'}); "
                "wait for it, end it, or choose another place with -o"
            ) from None
        except OSError:  # a file system without locks
            stream.close()
            return None
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                break
        stream.close()  # its last owner has removed it in between
    if leave:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
    return stream
