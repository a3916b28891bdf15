"""Exports that lie side by side in one directory, each in a few figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acip_export.artifacts.export_directory import exports_in, is_export, is_unverified
from acip_export.artifacts.names import CONFIG_FILE, EXPORTS, MANIFEST_FILE
from acip_export.errors import InputError
from acip_export.inspection.read import MODEL_SUFFIXES
from acip_export.report.page import Exported, read_export


@dataclass(frozen=True)
class Listed:
    """An export in its directory.

    Attributes:
        export: ``None``: it cannot be read. problem: why.
    """

    directory: Path
    export: Exported | None
    problem: str | None = None

    @property
    def written_bytes(self) -> int | None:
        """Bytes of its plan's files that are there."""
        if self.export is None:
            return None
        files = (self.directory / name for name in self.export.plan.files)
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def state(self) -> Literal["verified", "failed", "not verified", "unreadable"]:
        """What its last verification came to."""
        if self.export is None:
            return "unreadable"
        report = self.export.report
        if report is not None and not report.passed:
            return "failed"
        return "not verified" if report is None or is_unverified(self.directory) else "verified"

    @property
    def mean_kl(self) -> float | None:
        """Its divergence from the dense model, nats per token, in its first runtime."""
        report = None if self.export is None else self.export.report
        first = report.runtimes[0] if report is not None and report.runtimes else None
        return None if first is None or first.divergence is None else first.divergence.mean_kl

    def to_json(self) -> dict[str, Any]:
        """One of the list's entries."""
        plan = None if self.export is None else self.export.plan
        return {
            "path": str(self.directory),
            "format": None if plan is None else plan.format,
            "layout": None if plan is None else plan.layout,
            "planned_bytes": None if plan is None else plan.planned_bytes,
            "written_bytes": self.written_bytes,
            "state": self.state,
            "mean_kl": self.mean_kl,
            "problem": self.problem,
        }


def directories_of_exports(directory: Path) -> list[Path]:
    """Return the exports side by side in a directory; none of one that is an export, a bundle or a model itself."""
    if is_export(directory) or any((directory / name).is_file() for name in (CONFIG_FILE, MANIFEST_FILE)):
        return []
    if any(file.suffix in MODEL_SUFFIXES and file.is_file() for file in directory.glob("*")):
        return []
    return exports_in(directory)


def list_exports(directories: list[Path]) -> list[Listed]:
    """Read their plans and reports; one that is damaged, or of another version, does not hide the others."""
    return [_listed(directory) for directory in directories]


def _listed(directory: Path) -> Listed:
    try:
        return Listed(directory, read_export(directory))
    except InputError as error:
        return Listed(directory, None, str(error))


def listing_json(listed: list[Listed]) -> dict[str, Any]:
    """Return the document of ``inspect --json``."""
    return {
        "artifact": EXPORTS.artifact,
        "version": EXPORTS.version,
        "exports": [each.to_json() for each in listed],
    }
