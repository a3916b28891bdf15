"""Keep arrays that are too many for memory in a file without a name: it goes with its process, however that ends."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from acip_export.errors import OutputError

# Bytes: numbers that are read in the file begin at a whole number of their size.
_ALIGNED = 16


class ArrayStore(Protocol):
    """Keeps arrays by name."""

    def __contains__(self, name: str) -> bool: ...

    def write(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Store a contiguous array."""
        ...

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a fresh copy."""
        ...


class Scratch:
    """Store arrays by name, and read them whole. Threads may share it.

    Plain reads and writes, no memory map: what the system keeps of the file is its cache and not this process's.

    Args:
        contents: what it is for, for messages.

    Raises:
        OutputError: there is no place or no room in the directory.
    """

    def __init__(self, directory: Path | None = None, contents: str = "a ranking's scratch file") -> None:
        self._contents, self._lock = contents, Lock()
        self._place = Path(tempfile.gettempdir()) if directory is None else directory
        self._elsewhere = "TMPDIR=DIR" if directory is None else "--out"
        self._arrays: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        self._end = 0
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as reason:
            raise self._no_room(reason) from reason
        self._finalize = weakref.finalize(self, self._file.close)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in the order in which they were first written."""
        return iter(self._arrays)

    def write(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Store a contiguous array, in the place of one of that name and size that was there before."""
        with self._lock:
            position = self._position(name, array)
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, position)
                data, position = data[written:], position + written
        except OSError as reason:
            raise self._no_room(reason) from reason
        self._arrays[name] = position - array.nbytes, array.shape, array.dtype

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a fresh copy."""
        position, shape, dtype = self._arrays[name]
        array = np.empty(shape, dtype)
        data = memoryview(array.reshape(-1).view(np.uint8).data)
        while data:
            count = os.preadv(self._file.fileno(), [data], position)
            data, position = data[count:], position + count
        return array

    def mapped(self, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """Return arrays in the file itself, for who reads more of them than memory holds.

        They have what :meth:`write` makes of them, and are not to be changed.
        """
        whole = np.memmap(self._file, np.uint8, "c", shape=(self._end,))  # once: each map keeps a file open
        found = {}
        for name in names:
            position, shape, dtype = self._arrays[name]
            found[name] = whole[position : position + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return found

    def close(self) -> None:
        """Give the room back."""
        self._finalize()

    def _open(self) -> Any:
        return tempfile.TemporaryFile(dir=self._place)

    def _position(self, name: str, array: npt.NDArray[np.generic]) -> int:
        """Find room for an array."""
        before = self._arrays.get(name)
        if before is not None and before[1:] == (array.shape, array.dtype):
            return before[0]
        self._end += -self._end % _ALIGNED + array.nbytes
        return self._end - array.nbytes

    def _no_room(self, reason: OSError) -> OutputError:
        return OutputError(
            f"{self._place} has no room for {self._contents}: {reason.strerror}. Make room there, or choose another "
            f"place with  {self._elsewhere}"
        )
