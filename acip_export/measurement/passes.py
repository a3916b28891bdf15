"""Choose what is measured of a model's layers and classes of them. No torch: where all is known, none is needed."""

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
# Each layer is measured in its class's type of this loss, and counts for half a pass: the blocks before it are the
# dense model's. Classes whose layers would take more than what is left of these operations, half an hour on two cores,
# are left out.
_LAYER_LOSS = _LOSSES[-1]
_LAYER_OPERATIONS = 10**14


@dataclass(frozen=True)
class ClassPass:
    """The matrices of a class, or of a model with very large ones some of them, all in one type; or one of them.

    Attributes:
        name: of the class, or of the one tensor.
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
        rounded = _rounded(errors.format, losses)
        if not rounded:
            continue
        targets = _EMBEDDING_LOSSES if name in special else _LOSSES
        nearest = dict.fromkeys(_nearest(rounded, target) for target in targets)
        chosen += [(name, type_, rounded[type_], False) for type_ in nearest]
        blocks = {t: block for t in rounded if (block := weight_type(errors.format, t).input_block)}
        for block in sorted({min(blocks.values()), max(blocks.values())}) if blocks else ():
            best = min((t for t in blocks if blocks[t] == block), key=rounded.__getitem__)
            chosen.append((name, best, rounded[best], True))
    types: dict[str, set[str]] = {}
    for name, type_, _, _ in chosen:
        types.setdefault(name, set()).add(type_)
    members = _members(errors)
    operations = sum(
        _rounding_operations(shapes[t]) * len(chosen_types)
        for name, chosen_types in types.items()
        for t in members[name]
    )
    step = ceil_div(operations, _ROUNDING_OPERATIONS)
    found = []
    for name, type_, _, inputs in chosen:
        some = frozenset(t for t in members[name][(step - 1) // 2 :: step] if type_ in errors.dense[t])
        some = some or frozenset(t for t in members[name] if type_ in errors.dense[t])
        found.append(ClassPass(name, type_, some, sum(errors.dense[t][type_] for t in some), inputs))
    return tuple(found)


def layer_passes(
    errors: RoundingErrors,
    embeddings: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    pass_operations: float,
) -> tuple[ClassPass, ...]:
    """Choose which layers are measured alone, class by class: those first that are predicted to lose most.

    Args:
        embeddings, shapes: as of :func:`passes_for`. pass_operations: of a pass through the whole model.
    """
    special, members = {class_of(name) for name in embeddings}, _members(errors)
    found: list[ClassPass] = []
    left = float(_LAYER_OPERATIONS)
    for name, losses in sorted(class_losses(errors).items(), key=lambda each: -max(each[1].values(), default=0.0)):
        rounded = _rounded(errors.format, losses)
        if name in special or len(members[name]) < 2 or not rounded:
            continue
        type_ = _nearest(rounded, _LAYER_LOSS)
        layers = [t for t in members[name] if errors.dense[t].get(type_, 0.0) > 0]
        operations = sum(_rounding_operations(shapes[t]) + pass_operations / 2 for t in layers)
        if operations <= left:
            left -= operations
            found += (ClassPass(t, type_, frozenset({t}), errors.dense[t][type_]) for t in layers)
    return tuple(found)


def _rounded(format: str, losses: Mapping[str, float]) -> dict[str, float]:
    """Return the losses of those types that round."""
    return {t: loss for t, loss in losses.items() if loss > 0 and not weight_type(format, t).is_float}


def _nearest(losses: Mapping[str, float], target: float) -> str:
    """Return the type whose loss is nearest to ``target``, by their quotient."""
    return min(losses, key=lambda t: abs(log(losses[t] / target)))


def _members(errors: RoundingErrors) -> dict[str, list[str]]:
    """Return the tensors of every class, in their order."""
    members: dict[str, list[str]] = {}
    for tensor in sorted(errors.dense, key=natural_key):
        members.setdefault(class_of(tensor), []).append(tensor)
    return members


def _rounding_operations(shape: tuple[int, ...]) -> int:
    return 2 * prod(shape) * shape[1]
