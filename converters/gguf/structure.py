"""Whether the files hold every tensor that the plan decided about, by name, type and shape: only headers are read."""

from __future__ import annotations

from pathlib import Path

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.inspection import TensorPart, read_anatomy
from acip_export.inspection.gguf_split import files_of
from converters.gguf.arrange import arrange


def missing_tensors(export: Path, model: MaterializedModel) -> tuple[int, list[str]]:
    """Compare names, types and shapes; see :class:`acip_export.formats.protocol.ExportFormat`."""
    expected, missing = 0, []
    for file, items in arrange(model.as_checkpoint(), model.plan.layout, model.plan.tensors).items():
        opened = next(iter(files_of(file, model.plan.files)), file)
        found = {tensor.name: tensor for tensor in read_anatomy(export / opened).tensors}
        for spec in (item.spec for item in items):
            expected += 1
            there = found.get(spec.name)
            if there is None or (there.type, there.shape) != (spec.type, spec.shape):
                missing.append(_sentence(file, spec.name, spec.type, spec.shape, there))
    return expected, missing


def _sentence(file: str, name: str, form: str, shape: tuple[int, ...], there: TensorPart | None) -> str:
    found = "is missing" if there is None else f"is {there.type} {there.shape}"
    return f"{file}: {name} {found}, planned {form} {shape}"
