"""Look formats up by name. Installed packages add their own; see :mod:`acip_export.formats.protocol`."""

from __future__ import annotations

from typing import cast

from acip_export.formats.protocol import ExportFormat
from acip_export.installed import format_names, load_format

__all__ = ["export_format", "export_formats", "format_names"]


def export_format(name: str, backend: str | None = None) -> ExportFormat:
    """Return the format ``name`` as one backend has it; ``None``: the default one.

    Raises:
        UnsupportedError: an unknown format, or one without this backend.
    """
    return cast(ExportFormat, load_format(name)).on(backend)


def export_formats() -> tuple[ExportFormat, ...]:
    """Return all installed formats, in alphabetical order."""
    return tuple(export_format(name) for name in format_names())
