"""Find the formats that installed packages offer. Every format, ours included, is an entry point of one group.

Nothing but the standard library is imported here: the lowest layers look the rows of weight types up with it.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError

FORMAT_GROUP = "acip_export.formats"

logger = logging.getLogger(__name__)


@lru_cache
def format_names() -> tuple[str, ...]:
    """Return the names of all installed formats, in alphabetical order; of one that cannot be loaded users are told."""
    found = []
    for name in sorted(_entries()):
        try:
            load_format(name)
        except UnsupportedError as reason:
            logger.warning("%s", reason)
        else:
            found.append(name)
    return tuple(found)


@lru_cache
def load_format(name: str) -> Any:
    """Import the format ``name`` and return its object; see :class:`acip_export.formats.protocol.ExportFormat`.

    Raises:
        UnsupportedError: no installed package has a format of this name, or it cannot be imported.
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
    try:
        return entry.load()
    except Exception as reason:  # of another package: whatever it does wrong, the other formats work
        package = "a package" if entry.dist is None else f"the package {entry.dist.name}"
        raise UnsupportedError(
            f"the format {name!r} of {package} cannot be loaded ({type(reason).__name__}: {reason}); update the "
            "package, or remove it"
        ) from reason


@lru_cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=FORMAT_GROUP)}
