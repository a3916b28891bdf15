"""Find the formats that installed packages offer. Every format, ours included, is an entry point of one group.

Nothing but the standard library is imported here: the lowest layers look the rows of weight types up with it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError

FORMAT_GROUP = "acip_export.formats"


def format_names() -> tuple[str, ...]:
    """Return the names of all installed formats, in alphabetical order."""
    return tuple(sorted(_entries()))


@lru_cache
def load_format(name: str) -> Any:
    """Import the format ``name`` and return its object; see :class:`acip_export.formats.protocol.ExportFormat`.

    Raises:
        UnsupportedError: no installed package has a format of this name.
    """
    entry = _entries().get(name)
    if entry is None:
        names = format_names()
        known = (
            instead_of(name, names, "known")
            if names
            else "known: none; install acip-export with  pip install acip-export"
        )
        raise UnsupportedError(f"unknown format {name!r}; {known}")
    return entry.load()


@lru_cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=FORMAT_GROUP)}
