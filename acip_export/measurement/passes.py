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
    """The matrices of a class, all in one type."""

    name: str
    type: str
    tensors: frozenset[str]
    predicted: float


def passes_for(errors: RoundingErrors, embeddings: Collection[str]) -> tuple[ClassPass, ...]:
    """Choose what is measured: of each class the types nearest to what plans choose from.

    Args:
        embeddings: names of the embedding and of an untied head.
    """
    special = {class_of(name) for name in embeddings}
    chosen = []
    for name, losses in class_losses(errors).items():
        rounded = {t: loss for t, loss in losses.items() if loss > 0 and not weight_type(errors.format, t).is_float}
        if not rounded:
            continue
        targets = _EMBEDDING_LOSSES if name in special else _LOSSES
        nearest = dict.fromkeys(min(rounded, key=lambda t: abs(log(rounded[t] / target))) for target in targets)
        for type_ in nearest:
            tensors = frozenset(t for t, known in errors.dense.items() if class_of(t) == name and type_ in known)
            chosen.append(ClassPass(name, type_, tensors, rounded[type_]))
    return tuple(chosen)
