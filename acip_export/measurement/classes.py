"""Measure what rounding layers, and whole classes of them, costs: one pass for each, all of them block by block."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from torch import Tensor

from acip_export.artifacts.measured_losses import MeasuredLoss
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.io.kept_states import KeptStates
from acip_export.materialization.rounded_weights import RoundedWeights
from acip_export.measurement.block_passes import BlockPasses
from acip_export.measurement.passes import ClassPass
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Clock, ProgressCallback, silent


def measure_classes(
    checkpoint: Checkpoint,
    weights: RoundedWeights,
    plan: Plan,
    exact: str,
    passes: tuple[ClassPass, ...],
    windows: Tensor,
    stage: str = "calibrate",
    progress: ProgressCallback = silent,
    kept: KeptStates | None = None,
) -> list[MeasuredLoss]:
    """Measure each of ``passes`` on ``windows`` (n, tokens).

    Args:
        plan: any plan of the format: classes are rounded as it rounds. exact: a type of the format that rounds nothing.
        stage: named in reports of progress. kept: read and filled.

    Raises:
        UnsupportedError: the model's blocks are no chain, or rounded it computes nothing finite.
    """
    through = BlockPasses(checkpoint, windows)
    blocks = through.model.names

    def alone(measured: ClassPass) -> Plan:
        decisions = (
            TensorDecision(name, info.shape, "dense", 0, type=measured.type if name in measured.tensors else exact)
            for name, info in checkpoint.tensors.items()
        )
        return replace(plan, tensors=tuple(decisions), adapters=False)

    behind = kept.blocks if kept is not None else 0
    clock = Clock(stage, len(blocks) * (1 + len(passes)), progress, done=behind * (1 + len(passes)))
    variants = [weights.of(alone(each), each.inputs) for each in passes]
    divergences = through.divergences(variants, clock.advance, kept)
    found = []
    for each, divergence in zip(passes, divergences, strict=True):
        if not isfinite(divergence.kl):
            raise UnsupportedError(f"with {each.name} in {each.type} its logits are not finite")
        found.append(MeasuredLoss(each.predicted, max(0.0, divergence.kl), divergence.error))
    return found
