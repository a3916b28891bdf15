"""Tell, without reading it, whether a file has changed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Hold what the system says of a file, as long as it is the same.

    Attributes:
        size: bytes. written: when, in nanoseconds. inode: another file that was renamed to its place may be as large,
            and of the same time, when a copy keeps times.
    """

    size: int
    written: int
    inode: int


def stamp_of(file: Path) -> Stamp | None:
    """Look at a file; ``None``: there is none, or no more, or the system does not let us."""
    try:
        status = file.stat()
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
