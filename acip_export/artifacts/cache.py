"""Read caches beside a score file: one that is damaged, or of something else, is made again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from acip_export.artifacts.document import Artifact, decode_artifact
from acip_export.errors import InputError
from acip_export.io.inputs import read_input

logger = logging.getLogger(__name__)

# Seconds of measuring that a process which is killed may lose.
_AT_MOST_LOST = 2.0


@dataclass(frozen=True)
class FormatCache(Artifact):
    """What was measured for one format with one quantizer and one score file.

    Attributes:
        quantizer: package and version that rounded, and how codes were chosen, unless each weight's nearest.
        scores_sha256: of the score file.
    """

    format: str
    quantizer: str
    scores_sha256: str


_C = TypeVar("_C", bound=FormatCache)


def load_cache(file: Path, nothing: _C, problem: Callable[[_C], str | None] = lambda _cache: None) -> _C:
    """Return what the cache knows; ``nothing`` when it is not there, or was made for something else than ``nothing``.

    Args:
        problem: says what is wrong with contents of which each value has its type.
    """
    if not file.exists():
        return nothing
    try:
        known = decode_artifact(read_input(file, InputError), type(nothing), str(file), InputError, _OtherVersionError)
        if (wrong := problem(known)) is not None:
            raise InputError(f"{file}: {wrong}")
    except _OtherVersionError:
        return nothing
    except InputError as error:
        logger.warning("%s; it is measured again", error)
        return nothing
    same = (known.format, known.quantizer, known.scores_sha256)
    return known if same == (nothing.format, nothing.quantizer, nothing.scores_sha256) else nothing


@contextmanager
def kept_as_it_grows(save: Callable[[_C], bool]) -> Iterator[Callable[[_C], None]]:
    """Yield what is told of a cache each time that it knows more: it is saved now and then, and when the block ends.

    So what measures goes on where it was killed, or interrupted.

    Args:
        save: tells whether it could.
    """
    last, able, unsaved = time.monotonic(), True, list[_C]()

    def grown(cache: _C) -> None:
        nonlocal last, able
        unsaved[:] = [cache]
        if able and time.monotonic() - last >= _AT_MOST_LOST:
            able = save(cache)
            last = time.monotonic()
            unsaved.clear()

    try:
        yield grown
    finally:
        for cache in unsaved:
            save(cache)


class _OtherVersionError(InputError):
    """The cache was written by another version of this tool."""
