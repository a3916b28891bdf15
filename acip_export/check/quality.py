"""Quality of an export, read from the ``report.json`` that ``acip-export verify`` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from acip_export.errors import InputError

REPORT_FILE = "report.json"
_REPORT_VERSION = 2


@dataclass(frozen=True)
class Quality:
    """What a report says that a limit can be put on.

    Attributes:
        recovery: share kept of the dense model's quality: its perplexity over the export's, or the mean similarity of
            embeddings; ``None`` where the report has neither.
        measure: ``perplexity`` or ``similarity``, ``""`` without a recovery.
        load_seconds: until the runtime is ready, ``None`` where it was not measured.
        written_bytes: of the files that were verified.
    """

    recovery: float | None
    measure: str
    load_seconds: float | None
    written_bytes: int


def find_report(model: Path) -> Path | None:
    """The report of an export directory, or of a model file that lies in one."""
    file = (model if model.is_dir() else model.parent) / REPORT_FILE
    return file if file.is_file() else None


def read_quality(file: Path) -> Quality:
    """Read a report.

    Raises:
        InputError: damaged, of another version, or of an export that failed its verification.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["artifact"] != "acip-report" or report["version"] != _REPORT_VERSION:
            raise InputError(
                f"{file} is {report['artifact']!r} of version {report['version']}, expected 'acip-report' of version "
                f"{_REPORT_VERSION}; run  acip-export verify"
            )
        if report["passed"] is not True:
            raise InputError(f"{file} is the report of an export that failed its verification; export again")
        recovery, measure = _recovery(report)
        runtime = report["runtimes"][0] if report["runtimes"] else {}
        return Quality(recovery, measure, _positive(runtime.get("load_seconds")), int(report["written_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error!r}; run  acip-export verify  again") from error


def _recovery(report: dict[str, Any]) -> tuple[float | None, str]:
    similarity = _positive(report.get("similarity"))
    if similarity is not None:
        return similarity, "similarity"
    measured = [r["perplexity"] for r in report["runtimes"] if r.get("perplexity")]
    dense = report.get("dense_perplexity")
    if not measured or not dense:
        return None, ""
    own, reference = _positive(measured[0]["perplexity"]), _positive(dense["perplexity"])
    return (None, "") if own is None or reference is None else (reference / own, "perplexity")


def _positive(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0
    return float(value) if usable and isinstance(value, int | float) else None
