"""What a verification that takes long keeps beside the export, so that it goes on where its process was killed.

Passes through models are kept between two blocks, comparisons with a runtime between two windows, vectors of encoders
between a few texts, a rounded head between some rows, and what a process took, or a task gave, as a whole. The files
say what they follow from, and what follows from something else is not read. All of them are gone when the export is
verified.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from acip_export.errors import InputError, OutputError
from acip_export.formats.session import Tokens
from acip_export.io.atomic import keep
from acip_export.io.inputs import builtins, decode_json, read_json
from acip_export.io.kept_states import KeptStates
from acip_export.io.kept_until_done import kept_if_interrupted
from acip_export.io.kept_work import KeptWork, Work

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# What took fewer seconds is measured again.
_WORTH_KEEPING = 2.0


@dataclass(frozen=True)
class _Kept:
    """Figures, and ``origin``: all that they follow from."""

    origin: str
    figures: msgspec.Raw


class Unfinished:
    """Keeps things in files of a directory, which is made for the first of them.

    Args:
        made_by: what all of them follow from; each says what it follows from beside that.
    """

    def __init__(self, directory: Path, made_by: str) -> None:
        self._directory, self._made_by = directory, made_by

    def states(self, name: str, origin: str, behind: str) -> KeptStates:
        """Return what is kept of a pass, or of a comparison, to be read and filled; ``behind``: what it counts."""
        kept = KeptStates(self._directory / f"{name}.safetensors", f"{self._made_by}\n{origin}")
        if kept.blocks:
            logger.warning("%s: going on behind %s %d, from what an earlier run has kept", name, behind, kept.blocks)
        return kept

    def work(self, name: str) -> Work | None:
        """Return the steps of something that takes long, with those that are done; ``None`` where it has no place."""
        try:
            work = KeptWork(self._directory / name, self._made_by)
        except OutputError as reason:
            logger.warning(
                "%s is not kept (%s); a process that is killed starts again", name, reason.__cause__ or reason
            )
            return None
        if work.earlier:
            logger.warning("%s: going on behind step %d, from what an earlier run has kept", name, work.earlier)
        return work

    def figures(self, name: str, origin: str, kind: type[_T], measure: Callable[[], _T]) -> _T:
        """Return what something measured gave, measured unless an earlier run has.

        Args:
            kind: of the figures, plain JSON.
        """
        file = self._directory / f"{name}.json"
        follows = hashlib.sha256(f"{self._made_by}\n{origin}".encode()).hexdigest()
        if file.is_file():
            try:
                kept = read_json(file, _Kept, InputError)
                if kept.origin == follows:
                    return decode_json(bytes(kept.figures), kind, str(file), InputError)
            except InputError as reason:  # a power cut may leave a file without its content
                logger.warning("%s; it is measured again", reason)
        begin = time.monotonic()
        figures = measure()
        if time.monotonic() - begin >= _WORTH_KEEPING:
            data = json.dumps({"origin": follows, "figures": builtins(figures)}).encode()
            keep(file, data, "it is measured")
        return figures


@contextmanager
def unfinished(export: Path, made_by: str) -> Iterator[Unfinished]:
    """Yield what an earlier verification of ``export`` has left, or nothing yet.

    It is gone when the block ends, unless that is interrupted.
    """
    place = export.resolve()
    directory = place.parent / f".{place.name}.verification"
    with kept_if_interrupted(directory, "how far the verification is", then="the next one goes on"):
        yield Unfinished(directory, made_by)


def digest_of(windows: Iterable[Tokens]) -> str:
    """Return what tells windows of tokens apart."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray(window, np.int64).tobytes() + b"|")
    return digest.hexdigest()
