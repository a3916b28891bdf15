"""Whether the files hold every tensor that the plan decided about, by name, type and shape: only headers are read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import TensorDecision
from acip_export.artifacts.report import Structure
from acip_export.errors import ModelFileError
from acip_export.inspection import TensorPart, read_anatomy
from acip_export.inspection.gguf_split import files_of
from acip_export.model.architectures import HEAD
from converters.gguf.arrange import arrange
from converters.onnx.matrices import Form, MatrixPart, matrices_of

_LAYER = re.compile(r"(?<![A-Za-z0-9])(?:layers?|h|blocks?)[./](\d+)[./]")


def check_structure(export: Path, bundle: Bundle) -> tuple[Structure | None, list[str]]:
    """The count, and one sentence for each tensor that is not as planned; ``None`` for a target without a rule."""
    rule = {"gguf": _gguf, "onnx": _onnx}.get(bundle.plan.format)
    if rule is None:
        return None, []
    try:
        expected, missing = rule(export, bundle)
    except ModelFileError as error:
        return Structure(0, 0), [str(error)]
    return Structure(expected, expected - len(missing)), missing


def _gguf(export: Path, bundle: Bundle) -> tuple[int, list[str]]:
    expected, missing = 0, []
    for file, items in arrange(bundle.as_checkpoint(), bundle.plan.layout, bundle.plan.tensors).items():
        opened = next(iter(files_of(file, bundle.plan.files)), file)
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


def _onnx(export: Path, bundle: Bundle) -> tuple[int, list[str]]:
    """Initializers are named after graph nodes, so each is looked for among those of its layer, by type and shape.

    A tensor that two decisions could claim counts for one of them.
    """
    (graph,) = (name for name in bundle.plan.files if name.endswith(".onnx"))
    layers = bundle.as_checkpoint().shape.layers
    there = Counter((_layer(t.name, layers), t.type, t.shape) for t in read_anatomy(export / graph).tensors)
    expected, missing = 0, []
    for decision in bundle.plan.tensors:
        if bundle.as_checkpoint().shape.tied_embeddings and decision.name == HEAD:
            continue
        for alternatives in _initializers(decision):
            expected += 1
            keys = [(_layer(decision.name, layers), kind, shape) for kind, shape in alternatives]
            key = next((key for key in keys if there[key] > 0), None)
            if key is None:
                _, kind, shape = keys[0]
                missing.append(f"{graph}: nothing of type {kind} and shape {shape} is there for {decision.name}")
            else:
                there[key] -= 1
    return expected, missing


def _layer(name: str, layers: int) -> int | None:
    """``None`` outside the layers; the model builder calls the last norm a part of one layer more."""
    found = _LAYER.search(name)
    return int(found[1]) if found and int(found[1]) < layers else None


def _initializers(decision: TensorDecision) -> list[list[tuple[str, tuple[int, ...]]]]:
    """What a decision becomes, each with the arrangements that a node may want: ``(type, shape)``."""
    if len(decision.shape) != 2:
        return [[("float32", decision.shape), ("float16", decision.shape)]]  # the latter in graphs for graphics cards
    wanted: list[list[tuple[str, tuple[int, ...]]]] = []
    for _, matrix in matrices_of(decision):
        groups: tuple[tuple[Form, ...], ...] = (
            (("columns", "rows"),) if matrix.type.is_float else (("codes", "flat_codes"), ("scales",))
        )
        for forms in groups:
            parts = [MatrixPart(matrix, form) for form in forms]
            wanted.append([(part.dtype.name, part.shape) for part in parts])
    return wanted
