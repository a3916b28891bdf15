"""Keep what long work has done, step by step, in a directory beside its output, so that a killed process goes on.

Arrays go into scratch files that have names here, and a journal says which of them belong to the steps that are done: a
line for each, with checksums, written after the arrays. What a step that is not done has written is not in it. Nothing
is written in the place of an array that a step in the journal has, so the last line is true whenever the process ends.

Several processes that take the same steps keep a directory each. A step's line is written by all of them before any
goes on: however they end, none has more than one line that another has not, and what that line replaced is still there.
So all go on behind the last line that all have.
"""

from __future__ import annotations

import glob
import logging
import os
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from acip_export.errors import InputError, OutputError, RankingError
from acip_export.io.atomic import remove_directory
from acip_export.io.inputs import Count, decode_json, read_input
from acip_export.io.kept_until_done import (
    ORIGIN,
    bytes_in,
    kept_if_interrupted,
    no_place,
    own_directory,
    worth_keeping,
)
from acip_export.io.scratch import Scratch
from acip_export.units import format_bytes

logger = logging.getLogger(__name__)

_JOURNAL = "journal"
_LONGEST_JOURNAL = 2**30
_AT_ONCE = 2**24
# Of the journal's format, and of the steps of those who keep their work here.
_VERSION = 2


class Peers(Protocol):
    """Processes that take the same steps, each with a share of the work; this is the one of that ``index``."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...

    def least(self, number: int) -> int:
        """Return the least of the numbers that they give, once all have given one."""
        ...


class _Alone:
    index, count = 0, 1

    def least(self, number: int) -> int:
        return number


_ALONE = _Alone()


class Work:
    """Work of which nothing is kept: its scratch files have no names, and no step was done before."""

    def __init__(self) -> None:
        self._scratches: dict[str, Scratch] = {}

    def scratch(self, name: str) -> Scratch:
        """Return the scratch file of that name, with the arrays that the steps that are done have written."""
        scratch = self._scratches[name] = Scratch()
        return scratch

    def __contains__(self, step: str) -> bool:
        """Tell whether a step is done."""
        return False

    def facts(self, step: str) -> Any:
        """Return what a step that is done has said."""
        raise KeyError(step)

    def finish(self, step: str, facts: Any = None) -> None:
        """Note that a step is done: whatever was written until now is kept.

        Args:
            facts: plain JSON.
        """

    def drop(self, name: str) -> None:
        """Give the room of a scratch file back, which nobody needs any more."""
        if name in self._scratches:
            self._scratches.pop(name).close()


# Of a scratch file: no path to another place.
_Name = Annotated[str, Meta(pattern="^[a-z-]*$")]


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array in a scratch file."""

    position: Count
    shape: tuple[Count, ...]
    dtype: Annotated[str, Meta(pattern="^[<|][iuf][1248]$")]
    checksum: Count

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the journal says of a step; the first says with which settings, in how many processes, the work began."""

    step: str = ""
    facts: Any = None
    arrays: dict[_Name, dict[str, _Stored]] = {}
    dropped: _Name = ""
    settings: str = ""
    processes: Count = 1


class KeptWork(Work):
    """Work whose steps are kept in ``directory``, which one process at a time may use.

    Args:
        peers: processes that take the same steps, each with a directory of its own.

    Raises:
        OutputError: there is no place for it.
    """

    def __init__(self, directory: Path, origin: str, settings: str = "", peers: Peers = _ALONE) -> None:
        super().__init__()
        self.directory, self._peers, origin = directory, peers, f"{_VERSION} {origin}"
        self._facts: dict[str, Any] = {}
        self._arrays: dict[str, dict[str, _Stored]] = {}
        peers.least(0)  # nothing is touched by processes of which one may not write
        try:
            lines = _lines(self._file(_JOURNAL)) if own_directory(directory, origin) else []
            if lines and lines[0][0].processes != peers.count:
                before = lines[0][0].processes
                logger.warning(
                    "%s was kept by %d processes, and now there are %d; it begins anew", directory, before, peers.count
                )
                lines = []
            common = peers.least(len(lines))
            if not peers.least(self._restored(lines[:common])):
                if common > 1 or len(lines) > common + 1:  # one step more is no loss
                    lost = "is damaged" if peers.count == 1 else "is damaged, or what another process has kept is gone"
                    logger.warning("%s %s; it begins anew", directory, lost)
                self._facts, self._arrays = {}, {}
                remove_directory(directory)
                own_directory(directory, origin)
            self._journal = os.open(self._file(_JOURNAL), os.O_WRONLY | os.O_APPEND | os.O_CREAT | _no_link(), 0o600)
        except OSError as reason:
            raise no_place(directory, reason) from reason
        weakref.finalize(self, os.close, self._journal)
        self.earlier = len(self._facts)
        if not self.earlier:
            self._append(_Line(settings=settings, processes=peers.count))

    def scratch(self, name: str) -> Scratch:
        if name not in self._scratches:
            self._scratches[name] = _KeptScratch(self._file(name), self._arrays.get(name, {}))
        return self._scratches[name]

    def __contains__(self, step: str) -> bool:
        return step in self._facts

    def facts(self, step: str) -> Any:
        return self._facts[step]

    def finish(self, step: str, facts: Any = None) -> None:
        scratches = {name: file for name, file in self._scratches.items() if isinstance(file, _KeptScratch)}
        self._append(_Line(step, facts, {name: file.written() for name, file in scratches.items()}))
        self._peers.least(0)
        for file in scratches.values():
            file.settle()
        self._facts[step] = facts

    def drop(self, name: str) -> None:
        self._append(_Line(dropped=name))
        self._peers.least(0)
        super().drop(name)
        self._arrays.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / name

    def _append(self, line: _Line) -> None:
        data = _encoded(line)
        try:
            written = os.write(self._journal, data)
        except OSError as reason:
            raise OutputError(
                f"{self.directory} has no room for how far the work is: {reason.strerror}. Make room there, or choose "
                "another place with  --out"
            ) from reason
        if written < len(data):
            raise OutputError(f"{self.directory} has no room. Make room there, or choose another place with  --out")

    def _restored(self, lines: Sequence[tuple[_Line, int]]) -> bool:
        """Take over what these lines of the journal say; tell whether it is anything, and whole."""
        for line, _ in lines:
            for name, arrays in line.arrays.items():
                self._arrays.setdefault(name, {}).update(arrays)
            self._arrays.pop(line.dropped, None)
            if line.step:
                self._facts[line.step] = line.facts
        if not all(_is_whole(self._file(name), arrays) for name, arrays in self._arrays.items()):
            return False
        if not self._facts:
            return False
        os.truncate(self._file(_JOURNAL), lines[-1][1])
        for file in self.directory.iterdir():
            if file.name not in (ORIGIN, _JOURNAL, *self._arrays):  # dropped when the process ended
                file.unlink()
        return True


class _KeptScratch(Scratch):
    """A scratch file with a name: what a step that is done has written stays until a later step is done."""

    def __init__(self, file: Path, arrays: Mapping[str, _Stored]) -> None:
        self._named = file
        super().__init__(file.parent)
        self._checksums: dict[str, int] = {}
        self._stale: list[tuple[int, int]] = []
        self._free: list[tuple[int, int]] = []
        for stored in sorted(arrays.values(), key=lambda stored: stored.position):
            if stored.position > self._end:
                self._free.append((self._end, stored.position - self._end))
            self._end = max(self._end, stored.position + stored.nbytes)
        # In the order in which they were written first.
        self._arrays = {name: (s.position, s.shape, np.dtype(s.dtype)) for name, s in arrays.items()}
        os.ftruncate(self._file.fileno(), self._end)

    def written(self) -> dict[str, _Stored]:
        """Return what was written since :meth:`settle`."""
        return {
            name: _Stored(self._arrays[name][0], self._arrays[name][1], self._arrays[name][2].str, checksum)
            for name, checksum in self._checksums.items()
        }

    def settle(self) -> None:
        """Let what was replaced be overwritten from now on."""
        self._free += self._stale
        self._checksums, self._stale = {}, []

    def _open(self) -> Any:
        descriptor = os.open(self._named, os.O_RDWR | os.O_CREAT | _no_link(), 0o600)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _position(self, name: str, array: npt.NDArray[np.generic]) -> int:
        before = self._arrays.get(name)
        checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        settled, self._checksums[name] = name not in self._checksums, checksum
        if before is not None:
            size = prod(before[1]) * before[2].itemsize
            if size == array.nbytes and not settled:
                return before[0]
            (self._stale if settled else self._free).append((before[0], size))
        for index, (position, size) in enumerate(self._free):
            if size >= array.nbytes:
                self._free[index : index + 1] = [(position + array.nbytes, size - array.nbytes)][: size > array.nbytes]
                return position
        self._end += array.nbytes
        return self._end - array.nbytes


@contextmanager
def work_beside(target: Path, origin: str, settings: str = "", peers: Peers = _ALONE) -> Iterator[KeptWork]:
    """Yield the work for ``target``, with what a killed or interrupted process has done of it.

    It is gone when the block ends, unless it is interrupted after more than a minute's work, or ends with a
    :class:`RankingError`: other settings for what came later do not change what was done before.

    Args:
        origin: all that the work follows from; what is of another is removed. settings: see :func:`kept_settings`.
        peers: processes that work for the same target; what more of them have kept is removed.

    Raises:
        OutputError: there is no place for it.
    """
    begin = time.monotonic()
    work = KeptWork(_beside(target, peers.index), origin, settings, peers)
    if peers.index == 0:
        _remove_of_others(target, peers.count)
    if work.earlier and peers.index == 0:
        logger.warning("going on with the %s that an earlier run has kept", format_bytes(kept_bytes(target)))

    def worth() -> bool:
        return work.earlier > 0 or worth_keeping(time.monotonic() - begin)

    with kept_if_interrupted(work.directory, "what is done", worth, (RankingError,)):
        yield work


def kept_bytes(target: Path) -> int:
    """Return the bytes that an earlier run has kept for ``target``: room that the next one need not find again."""
    return bytes_in(_beside(target))


def kept_settings(target: Path) -> str:
    """Return the settings that an earlier run has kept its work for ``target`` with; empty where there are none."""
    lines = _lines(_beside(target) / _JOURNAL)
    return lines[0][0].settings if lines else ""


def _beside(target: Path, index: int = 0) -> Path:
    return target.parent / f".{target.name}.rank-state{f'-{index}' if index else ''}"


def _remove_of_others(target: Path, count: int) -> None:
    """Remove what processes have kept of which there are no longer so many."""
    for directory in target.parent.glob(f"{glob.escape(_beside(target).name)}-*"):
        index = directory.name.rpartition("-")[2]
        if index.isdecimal() and int(index) >= count:
            remove_directory(directory)


def _no_link() -> int:
    return getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def _encoded(line: _Line) -> bytes:
    data = msgspec.json.encode(line)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def _lines(journal: Path) -> list[tuple[_Line, int]]:
    """Read the lines up to the first that is not whole, each with the place where it ends."""
    lines, end = list[tuple[_Line, int]](), 0
    with suppress(InputError):
        for text in read_input(journal, InputError, _LONGEST_JOURNAL).splitlines(keepends=True):
            checksum, _, data = text.removesuffix(b"\n").partition(b" ")
            if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(data):
                break
            end += len(text)
            lines.append((decode_json(data, _Line, str(journal), InputError), end))
    return lines


def _is_whole(file: Path, arrays: Mapping[str, _Stored]) -> bool:
    """Tell whether a file has all of its arrays: a power cut may leave it without some of its content."""
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | _no_link()), "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            for stored in arrays.values():
                if stored.position + stored.nbytes > size:
                    return False
                stream.seek(stored.position)
                left, checksum = stored.nbytes, 0
                while left:
                    part = stream.read(min(left, _AT_ONCE))
                    if not part:
                        return False
                    checksum = zlib.crc32(part, checksum)
                    left -= len(part)
                if checksum != stored.checksum:
                    return False
    except OSError:
        return False
    return True
