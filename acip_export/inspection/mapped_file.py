"""Files mapped into memory: only the pages that are looked at are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acip_export.errors import ModelFileError
from acip_export.io.inputs import open_input
from acip_export.io.placeholders import refuse_placeholder


@contextmanager
def map_file(file: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file that is not empty.

    Raises:
        ModelFileError: missing, empty, unreadable, or a Git LFS pointer in place of the file.
    """
    try:
        refuse_placeholder(file, ModelFileError)
        with open_input(file, ModelFileError) as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error}") from error
    with data:
        yield data
