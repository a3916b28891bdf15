"""Quality of an export, read from the ``report.json`` that ``acip-export verify`` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from acip_export.artifacts.report import Report, load_report
from acip_export.errors import InputError
from acip_export.io.inputs import Count, NotNegative, PositiveFloat


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

    recovery: PositiveFloat | None
    measure: Literal["perplexity", "similarity", ""]
    load_seconds: NotNegative | None
    written_bytes: Count


def read_quality(file: Path) -> Quality:
    """Read a report.

    Raises:
        InputError: damaged, of another version, or of an export that failed its verification.
    """
    report = load_report(file)
    if not report.passed:
        raise InputError(f"{file} is the report of an export that failed its verification; export again")
    recovery, measure = _recovery(report)
    seconds = report.runtimes[0].load_seconds if report.runtimes else None
    return Quality(recovery, measure, seconds or None, report.written_bytes)


def _recovery(report: Report) -> tuple[float | None, Literal["perplexity", "similarity", ""]]:
    if report.similarity is not None and report.similarity > 0:
        return report.similarity, "similarity"
    if report.perplexity is None or report.dense_perplexity is None:
        return None, ""
    _, own = report.perplexity
    return report.dense_perplexity.perplexity / own.perplexity, "perplexity"
