"""Whether the files hold every tensor that the plan decided about."""

from __future__ import annotations

from pathlib import Path

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.report import Structure
from acip_export.errors import ModelFileError
from acip_export.formats.protocol import ExportFormat


def check_structure(export_format: ExportFormat, export: Path, model: MaterializedModel) -> tuple[Structure, list[str]]:
    """Count the tensors, and describe each that is not as planned in one sentence."""
    try:
        expected, missing = export_format.missing_tensors(export, model)
    except ModelFileError as error:
        return Structure(0, 0), [str(error)]
    return Structure(expected, expected - len(missing)), list(missing)
