"""Whether the graph holds every tensor that the plan decided about, by layer, type and shape: only headers are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import TensorDecision
from acip_export.inspection import read_anatomy
from acip_export.model.tensor_names import HEAD, layer_of
from converters.onnx.matrices import Form, MatrixPart, matrices_of


def missing_tensors(export: Path, model: MaterializedModel) -> tuple[int, list[str]]:
    """Initializers are named after graph nodes, so each is looked for among those of its layer, by type and shape.

    A tensor that two decisions could claim counts for one of them.
    """
    (graph,) = (name for name in model.plan.files if name.endswith(".onnx"))
    layers = model.as_checkpoint().shape.layers
    there = Counter((_layer(t.name, layers), t.type, t.shape) for t in read_anatomy(export / graph).tensors)
    expected, missing = 0, []
    for decision in model.plan.tensors:
        if model.as_checkpoint().shape.tied_embeddings and decision.name == HEAD:
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
    layer = layer_of(name)
    return layer if layer is not None and layer < layers else None


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
