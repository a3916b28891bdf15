"""Keep what long work has done until all of it is done, so that the same command goes on after a kill or Ctrl-C.

What is kept says all that it follows from, its origin: what is of another is not read. It is gone when the work is done
or fails. An interruption leaves it, where making it again would take long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from acip_export.errors import OutputError
from acip_export.io.atomic import remove_directory, remove_leftovers
from acip_export.units import format_bytes

logger = logging.getLogger(__name__)

# What took fewer seconds is done again rather than left behind by an interruption.
_WORTH_KEEPING = 60.0
# The file of a directory that says what all of it follows from.
ORIGIN = "origin"


def worth_keeping(seconds: float) -> bool:
    """Tell whether work of so many seconds is left behind by an interruption."""
    return seconds >= _WORTH_KEEPING


@contextmanager
def kept_if_interrupted(
    place: Path,
    what: str,
    worth: Callable[[], bool] = lambda: True,
    also: tuple[type[Exception], ...] = (),
    then: str = "the same command goes on",
) -> Iterator[None]:
    """Remove the file or directory ``place`` when the block ends, unless it is interrupted.

    Args:
        what: is kept, and ``then``: what is possible because of it, for the message.
        worth: tells whether it took long enough. also: failures that are no reason to remove it.
    """
    try:
        yield
    except BaseException as ending:
        if not worth() or (isinstance(ending, Exception) and not isinstance(ending, also)):
            _remove(place)
        elif place.exists():
            logger.warning("%s stays in %s, %s: %s", what, place, format_bytes(bytes_in(place)), then)
        raise
    _remove(place)


def own_directory(place: Path, origin: str) -> bool:
    """Make a directory for what follows from ``origin``; tell whether there was one. One of another origin is removed.

    Raises:
        OutputError: there is no place for it.
    """
    with suppress(OSError, ValueError):
        if not place.is_symlink() and (place / ORIGIN).read_text(encoding="utf-8") == origin:
            return True
    try:
        if place.is_dir() and any(place.iterdir()):
            logger.warning("%s is of another model, text or settings; it begins anew", place)
        remove_directory(place)
        place.mkdir(mode=0o700, parents=True)
        (place / ORIGIN).write_text(origin, encoding="utf-8")
    except OSError as reason:
        raise no_place(place, reason) from reason
    return False


def no_place(place: Path, reason: OSError) -> OutputError:
    """Return the error that says that nothing can be kept in ``place``."""
    return OutputError(f"{place} cannot be written: {reason.strerror}; choose another place with --out")


def bytes_in(place: Path) -> int:
    """Return the bytes of a file, or of all files below a directory; 0 where nothing is."""
    total = 0
    with suppress(OSError):
        for file in place.rglob("*") if place.is_dir() else [place]:
            total += file.stat().st_size if file.is_file() else 0
    return total


def _remove(place: Path) -> None:
    with suppress(OSError):  # a place that cannot be written to has none
        if place.is_dir():
            remove_directory(place)
        place.unlink(missing_ok=True)
        remove_leftovers(place)
