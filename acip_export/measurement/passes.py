"""Choose what is measured of a model's classes of layers. No torch: where all of it is known, none is needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import log

from acip_export.artifacts.measured_losses import class_losses
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.model.tensor_names import class_of
from acip_export.weight_types import weight_type

# A class is measured in the types that are predicted to be nearest to these losses, nats per token: between and around
# them plans choose. Of an embedding more is at stake, and less is known.
_LOSSES = (0.001, 0.02)
_EMBEDDING_LOSSES = (0.0003, 0.003, 0.03)


@dataclass(frozen=True)
class ClassPass:
    """The matrices of a class, all in one type.

    Attributes:
        predicted: the sum of their rounding errors.
        inputs: whether what they are multiplied with is rounded too.
    """

    name: str
    type: str
    tensors: frozenset[str]
    predicted: float
    inputs: bool = False


def passes_for(errors: RoundingErrors, embeddings: Collection[str]) -> tuple[ClassPass, ...]:
    """Choose what is measured: of each class the types nearest to what plans choose from, without and with its inputs.

    Inputs are rounded in blocks, whose sizes are the types': the smallest and the largest are measured, each with the
    type that rounds the matrices least.

    Args:
        embeddings: names of the embedding and of an untied head.
    """
    special = {class_of(name) for name in embeddings}
    chosen: list[tuple[str, str, float, bool]] = []
    for name, losses in class_losses(errors).items():
        rounded = {t: loss for t, loss in losses.items() if loss > 0 and not weight_type(errors.format, t).is_float}
        if not rounded:
            continue
        targets = _EMBEDDING_LOSSES if name in special else _LOSSES
        nearest = dict.fromkeys(min(rounded, key=lambda t: abs(log(rounded[t] / target))) for target in targets)
        chosen += [(name, type_, rounded[type_], False) for type_ in nearest]
        blocks = {t: block for t in rounded if (block := weight_type(errors.format, t).input_block)}
        for block in sorted({min(blocks.values()), max(blocks.values())}) if blocks else ():
            best = min((t for t in blocks if blocks[t] == block), key=rounded.__getitem__)
            chosen.append((name, best, rounded[best], True))
    return tuple(
        ClassPass(
            name,
            type_,
            frozenset(t for t, known in errors.dense.items() if class_of(t) == name and type_ in known),
            predicted,
            inputs,
        )
        for name, type_, predicted, inputs in chosen
    )
