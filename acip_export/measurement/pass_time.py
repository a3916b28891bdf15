"""Estimate how long :mod:`acip_export.measurement.classes` takes, from sizes alone.

docs/LOG.md has the measurements that the figures are from.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from acip_export.machine import Machine
from acip_export.measurement.passes import ClassPass
from acip_export.measurement.rounding_time import RoundingWork
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import HEAD, is_embedding
from acip_export.ranking.estimate import RankModel
from acip_export.weight_types import weight_type

# Of the speed of products, passes of a few hundred tokens through one block after the other reach this share.
_REACHED = 0.5


def pass_seconds(
    checkpoint: Checkpoint,
    passes: Sequence[ClassPass],
    format: str,
    tokens: int,
    feedback_types: Collection[str],
    machine: Machine,
    share: float = 1.0,
) -> float:
    """Return about how long so many tokens take through the dense model and every pass, all of them rounded before.

    Args:
        format: the weight format whose types the passes have. feedback_types: those with error feedback.
        share: of the blocks that a pass goes through.
    """
    types: dict[str, list[str]] = {}
    for each in passes:
        for name in each.tensors:
            known = types.setdefault(name, [])
            if each.type not in known:
                known.append(each.type)
    shapes = {name: (checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in types}
    rounding = RoundingWork(
        shapes,
        {name: [weight_type(format, form) for form in known] for name, known in types.items()},
        RankModel(checkpoint).moment_columns,
        (),
        (),
        feedback_types,
        whole=True,
        factors_kept=True,  # by measuring the types, which comes first
    )
    layers = sum(out * inputs for out, inputs in checkpoint.linear_modules.values())
    head = checkpoint.shape.vocabulary * checkpoint.shape.hidden
    # With every other head the dense model's logits are made once more.
    dense_again = sum(len(known) for name, known in types.items() if name == HEAD or is_embedding(name))
    through = layers + head + len(passes) * (share * layers + head)
    operations = 2 * tokens * (through + dense_again * head)
    return operations / (_REACHED * machine.float32) + rounding.seconds(machine)
