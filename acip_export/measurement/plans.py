"""Run plans without writing them: what each loses on a text, from its rounded weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from torch import Tensor

from acip_export.artifacts.plan import Plan
from acip_export.errors import AcipError, UnsupportedError
from acip_export.io.kept_states import KeptStates
from acip_export.materialization.rounded_weights import RoundedWeights
from acip_export.measurement.block_passes import BlockPasses, MeasuredDivergence
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Clock, ProgressCallback, silent


def measure_plans(
    checkpoint: Checkpoint,
    weights: RoundedWeights,
    plans: Sequence[Plan],
    windows: Tensor,
    progress: ProgressCallback = silent,
    kept: KeptStates | None = None,
) -> list[MeasuredDivergence | AcipError]:
    """Measure every plan on ``windows`` (n, tokens); for one that does not run, the reason stands in its place.

    Args:
        kept: read and filled.
    """
    passes = BlockPasses(checkpoint, windows)
    blocks = passes.model.names
    behind = kept.blocks if kept is not None else 0
    clock = Clock("compare plans", len(blocks) * (1 + len(plans)), progress, done=behind * (1 + len(plans)))
    variants = [weights.of(plan) for plan in plans]
    try:
        return [_checked(found) for found in passes.divergences(variants, clock.advance, kept)]
    except AcipError:
        return [_alone(passes, weights, plan) for plan in plans]


def _alone(passes: BlockPasses, weights: RoundedWeights, plan: Plan) -> MeasuredDivergence | AcipError:
    try:
        (found,) = passes.divergences([weights.of(plan)])
    except AcipError as reason:
        return reason
    return _checked(found)


def _checked(found: MeasuredDivergence) -> MeasuredDivergence | AcipError:
    return found if isfinite(found.kl) else UnsupportedError("its logits are not finite")
