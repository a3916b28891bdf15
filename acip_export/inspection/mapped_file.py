"""Files mapped into memory: only the pages that are looked at are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acip_export.errors import ModelFileError
from acip_export.io.inputs import open_input

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def map_file(file: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file that is not empty.

    Raises:
        ModelFileError: missing, empty, unreadable, or a Git LFS pointer in place of the file.
    """
    try:
        with open_input(file, ModelFileError) as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelFileError(f"{file} is a Git LFS pointer, not the file itself; run  git lfs pull")
            if stream.seek(0, 2) == 0:
                raise ModelFileError(f"{file} is empty")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error}") from error
    with data:
        yield data
