"""Rounded matrices, kept in files for as long as one export is written and verified.

An export and the reference that it is compared with are rounded by the same code from the same numbers. Error feedback
takes longer than everything else there, and so does the nearest code of very large matrices: what the one has rounded
the other reads. Files are named by everything that the rounding depends on.

Beside an export they outlive a process that is killed, so that the same command goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from acip_export.errors import OutputError
from acip_export.io.atomic import keep, new_file, remove_directory
from acip_export.io.kept_until_done import bytes_in, kept_if_interrupted, own_directory, worth_keeping
from acip_export.units import format_bytes

if TYPE_CHECKING:
    import torch

    from acip_export.rounding.error_feedback import FeedbackFactor

Arrays = Sequence[npt.NDArray[Any]]

logger = logging.getLogger(__name__)

# Rounded to the nearest code, a matrix of so many weights takes a tenth of a second or two.
_LARGE = 2**22
# Rows whose float32 copy is hashed at once.
_ROWS = 512
_PIECES = (".npz", ".finished")
# What np.savez calls the first array.
_FIRST = "arr_0"


class KeptRoundings:
    """Reads and fills an existing directory. Threads may share it.

    Attributes:
        seconds: what making the new ones has taken, over all threads.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.seconds = directory, 0.0

    def arrays(
        self,
        weight: torch.Tensor,
        type: str,
        importance: torch.Tensor | None,
        feedback: FeedbackFactor | None,
        compute: Callable[[], Arrays],
        row_feedback: FeedbackFactor | None = None,
    ) -> Arrays:
        """Return what ``compute`` makes of a matrix, computed for the first to ask; without error feedback, of a small
        one for all of them.

        Args:
            weight, type, importance, feedback, row_feedback: all that the result depends on.

        Raises:
            OutputError: the disk is full.
        """
        if feedback is None and weight.numel() <= _LARGE:
            return compute()
        file = self.directory / f"{_key(weight, type, importance, (feedback, row_feedback))}.npz"
        kept = _read(file)
        if kept is not None:
            return list(kept.values())
        with self.timed():
            arrays = compute()
        _write(file, *arrays)
        return arrays

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what is done inside: so much time would be lost."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin

    def state(self, name: str, sha256: str) -> Path:
        """Return the file in which a run that takes long keeps how far it is with a plan."""
        return self.directory / f"{name}-{sha256}.safetensors"

    def finished(self, what: str) -> str:
        """Return what :meth:`finish` has noted; empty: nothing."""
        with suppress(OSError, ValueError):
            return self._note(what).read_text(encoding="utf-8")
        return ""

    def finish(self, what: str, sha256: str, seconds: float) -> None:
        """Note that something lies in its place, beside these files.

        Args:
            sha256: what tells whether it has changed since. seconds: that it took.
        """
        self.seconds += seconds  # some of them were counted already
        keep(self._note(what), sha256.encode(), "it is made")

    def _note(self, what: str) -> Path:
        return self.directory / f"{hashlib.blake2b(what.encode(), digest_size=20).hexdigest()}.finished"

    def parts(self, sha256: str) -> KeptParts:
        """Return what is kept of a plan beside its roundings."""
        return KeptParts(self.directory / f"parts-{sha256}")


class KeptParts:
    """Arrays of one plan by name, as :class:`acip_export.io.scratch.Scratch` has them, in files that outlive a kill."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __contains__(self, name: str) -> bool:
        return _read(self._file(name)) is not None

    def write(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Store an array. Raises OutputError where there is no room."""
        _write(self._file(name), array)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a fresh copy."""
        kept = _read(self._file(name))
        if kept is None:
            raise OutputError(f"{self._directory} is damaged, or somebody has removed something from it; try again")
        return kept[_FIRST]

    def close(self) -> None:
        """Remove all of them."""
        remove_directory(self._directory)

    def _file(self, name: str) -> Path:
        return self._directory / f"{hashlib.blake2b(name.encode(), digest_size=20).hexdigest()}.npz"


def _read(file: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Return the arrays of a file; ``None`` where it is not there or not whole."""
    # A power cut may leave a file without its content; the archive's checksums tell.
    with (
        suppress(FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile),
        file.open("rb") as stream,
        np.load(stream) as stored,
    ):
        return {name: stored[name] for name in stored.files}
    return None


def _write(file: Path, *arrays: npt.NDArray[Any]) -> None:
    """Raises OutputError where there is no room."""
    with new_file(file) as temporary, temporary.open("wb") as new:
        np.savez(new, *arrays)


@contextmanager
def roundings_beside(target: Path, origin: str) -> Iterator[KeptRoundings]:
    """Yield what is rounded for the export ``target``, with what a killed or interrupted process left of it.

    It is gone when the block ends, unless it is interrupted after more than a minute's work.

    Args:
        origin: all that the roundings follow from; what is of another is removed.

    Raises:
        OutputError: there is no place for it.
    """
    directory, earlier = _beside(target), 0
    kept = KeptRoundings(directory)
    with kept_if_interrupted(
        directory,
        "what is rounded",
        lambda: earlier > 0 or worth_keeping(kept.seconds),
        then="the same command goes on, and so does  verify",
    ):
        if own_directory(directory, origin):
            earlier = sum(file.suffix in _PIECES for file in directory.rglob("[!.]*"))
        if earlier:
            size = format_bytes(bytes_in(directory))
            logger.warning("going on with what an earlier run has rounded: %d pieces, %s", earlier, size)
        yield kept


def are_beside(target: Path) -> bool:
    """Tell whether an earlier run has left any."""
    return _beside(target).exists()


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.rounded"


def _key(
    weight: torch.Tensor, type: str, importance: torch.Tensor | None, factors: Sequence[FeedbackFactor | None]
) -> str:
    known = [each is not None for each in (importance, *factors)]
    digest = hashlib.blake2b(f"{type} {tuple(weight.shape)} {known}".encode(), digest_size=20)
    for start in range(0, len(weight), _ROWS):
        digest.update(weight[start : start + _ROWS].float().contiguous().numpy().data)
    if importance is not None:
        digest.update(importance.contiguous().numpy().data)
    for factor in factors:
        for array in () if factor is None else (factor.order, factor.codes, factor.steps):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
