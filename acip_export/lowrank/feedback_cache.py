"""Keep the factors of error feedback of wide layers on disk, so that one command makes them for all that follow.

One file for each factor in the user's cache, named by what went in: SHA-256 over the packed moment, what its vectors
were scaled by, and what computed it. Measuring types, tuning, exports and their verification share entries, several
processes at once too; one of another score file or version is never found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from acip_export.errors import OutputError
from acip_export.io.atomic import new_file, remove_directory, user_cache
from acip_export.lowrank.moments import PackedMoment
from acip_export.rounding.error_feedback import FeedbackFactor
from acip_export.rounding.quantizer import FEEDBACK_VERSION

logger = logging.getLogger(__name__)

_VERSION = "2"
# Factors of fewer columns are made in milliseconds.
LEAST_COLUMNS = 1024
# All entries together, which is enough for a model of 8 billion parameters, and what stays free on the disk.
MOST_BYTES, _LEFT_FREE = 5 * 2**30, 2 * 10**9
# Entries that were used so lately stay, and new ones that find no room are not kept: a model whose factors are more
# than fits reads each of them again while it is exported, and would find the first ones gone.
_IN_USE_SECONDS = 3600.0
_ENTRY, _UNFINISHED = re.compile(r"[0-9a-f]{64}\.factor"), re.compile(r"\.[0-9a-f]{64}\.factor\.[0-9a-f]{8}\.tmp")
_DIGEST_BYTES = 32


def feedback_directory() -> Path:
    """Return where factors are kept; it need not exist."""
    return user_cache() / "feedback"


class FeedbackCache:
    """Read and fill a directory. Threads and processes may share it.

    A place that cannot be written to, or has no room, is no error: factors are made then.

    Args:
        directory: ``None``: that of the user.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = feedback_directory() if directory is None else directory

    def factor(self, moment: PackedMoment, name: str) -> FeedbackFactor:
        """Return :meth:`PackedMoment.feedback_factor`, made for the first to ask.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        origin = moment.digest
        known = self.read(origin, moment.size)
        if known is None:
            known = moment.feedback_factor(name)
            self.write(origin, known)
        return known

    def read(self, origin: bytes, size: int) -> FeedbackFactor | None:
        """Return the factor of ``size`` columns or rows that follows from ``origin``.

        Returns:
            ``None``: nothing is kept, or it is damaged.
        """
        if size < LEAST_COLUMNS:
            return None
        file = self._file(origin)
        try:
            if file.stat().st_size != entry_bytes(size):
                return None
            # Arrays that may be written to: torch warns of others.
            data = np.fromfile(file, np.uint8)
        except OSError:
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content.data).digest() != digest.tobytes():
            return None
        order, steps, codes = np.split(content, (4 * size, 8 * size))
        factor = FeedbackFactor(order.view(np.int32), codes.view(np.int8), steps.view(np.float32))
        with suppress(OSError):
            os.utime(file)
        return factor

    def write(self, origin: bytes, factor: FeedbackFactor) -> bool:
        """Keep what follows from ``origin``, if it is wide and there is room.

        Returns:
            Whether it is kept.
        """
        if factor.size < LEAST_COLUMNS:
            return False
        parts = factor.order.data, factor.steps.data, factor.codes.data
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self._file(origin)
            if not self._has_room(file, entry_bytes(factor.size)):
                return False
            with new_file(file) as temporary, temporary.open("wb") as new:
                new.write(digest.digest())
                for part in parts:
                    new.write(part)
        except (OSError, OutputError) as reason:
            logger.info("a factor of error feedback is not kept: %s", reason)
            return False
        return True

    def _file(self, origin: bytes) -> Path:
        return self.directory / f"{_key(origin)}.factor"

    def _has_room(self, new: Path, nbytes: int) -> bool:
        """Tell whether an entry of so many bytes fits, and remove those not used for longest until it does."""
        if shutil.disk_usage(self.directory).free - nbytes < _LEFT_FREE:
            return False
        now, entries = time.time(), []
        with os.scandir(self.directory) as listed:
            for each in listed:
                with suppress(OSError):  # another process may have removed it
                    status = each.stat(follow_symlinks=False)
                    unused = now - status.st_mtime >= _IN_USE_SECONDS
                    if each.name == new.name:  # it is replaced
                        continue
                    if _ENTRY.fullmatch(each.name) and each.is_file(follow_symlinks=False):
                        entries.append((status.st_mtime, status.st_size, unused, Path(each.path)))
                    elif _UNFINISHED.fullmatch(each.name) and unused:  # of a process that was killed
                        remove_directory(Path(each.path))
        excess = nbytes - MOST_BYTES + sum(size for _, size, _, _ in entries)
        for _, size, unused, file in sorted(entries):
            if excess <= 0 or not unused:
                break
            file.unlink(missing_ok=True)
            excess -= size
        return excess <= 0


def entry_bytes(size: int) -> int:
    """Return what the factor of so many columns or rows takes."""
    return _DIGEST_BYTES + 8 * size + size * (size - 1) // 2


def _key(origin: bytes) -> str:
    """Name all that a factor follows from: sums may differ in their last bits with PyTorch, its threads and processors.

    Machines of several kinds may share a home.
    """
    import torch

    computed_by = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    computed = "".join(f"{each}|" for each in (_VERSION, FEEDBACK_VERSION, *computed_by))
    return hashlib.sha256(computed.encode() + origin).hexdigest()
