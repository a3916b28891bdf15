"""Choose what is measured of a model's classes of layers. No torch: where all of it is known, none is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import log, prod

from acip_export.artifacts.measured_losses import class_losses
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.model.tensor_names import class_of, natural_key
from acip_export.units import ceil_div
from acip_export.weight_types import weight_type

# A class is measured in the types that are predicted to be nearest to these losses, nats per token: between and around
# them plans choose. Of an embedding more is at stake, and less is known.
_LOSSES = (0.001, 0.02)
_EMBEDDING_LOSSES = (0.0003, 0.003, 0.03)
# Operations of carrying errors when all of it is rounded, which are ten minutes on two cores. Beyond them only some
# layers of each class are rounded, spread over the depth: what is measured is how much more, or less, a class loses
# than was predicted of the same layers.
_ROUNDING_OPERATIONS = 4 * 10**13


@dataclass(frozen=True)
class ClassPass:
    """The matrices of a class, or of a model with very large ones some of them, all in one type.

    Attributes:
        predicted: the sum of their rounding errors.
        inputs: whether what they are multiplied with is rounded too.
    """

    name: str
    type: str
    tensors: frozenset[str]
    predicted: float
    inputs: bool = False


def passes_for(
    errors: RoundingErrors, embeddings: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ClassPass, ...]:
    """Choose what is measured: of each class the types nearest to what plans choose from, without and with its inputs.

    Inputs are rounded in blocks, whose sizes are the types': the smallest and the largest are measured, each with the
    type that rounds the matrices least.

    Args:
        embeddings: names of the embedding and of an untied head. shapes: of all tensors, by name.
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
    types: dict[str, set[str]] = {}
    for name, type_, _, _ in chosen:
        types.setdefault(name, set()).add(type_)
    members: dict[str, list[str]] = {name: [] for name in types}
    for tensor in sorted(errors.dense, key=natural_key):
        if class_of(tensor) in members:
            members[class_of(tensor)].append(tensor)
    operations = sum(
        2 * prod(shapes[t]) * shapes[t][1] * len(types[name]) for name, all_ in members.items() for t in all_
    )
    step = ceil_div(operations, _ROUNDING_OPERATIONS)
    found = []
    for name, type_, _, inputs in chosen:
        some = frozenset(t for t in members[name][(step - 1) // 2 :: step] if type_ in errors.dense[t])
        some = some or frozenset(t for t in members[name] if type_ in errors.dense[t])
        found.append(ClassPass(name, type_, some, sum(errors.dense[t][type_] for t in some), inputs))
    return tuple(found)
