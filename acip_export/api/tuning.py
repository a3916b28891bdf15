"""Tune a plan's scales, vectors and pairs before its export is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.api.calibration import held_out_windows
from acip_export.api.rank import rounding_scores
from acip_export.api.text import calibration_windows
from acip_export.artifacts.plan import Plan, numbers_sha256
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import UnsupportedError, UsageError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.rounding.kept_roundings import KeptRoundings

if TYPE_CHECKING:
    from acip_export.artifacts.tuned import Tuned

# Tokens of a window to tune on.
_WINDOW = 256


def check_tuning(checkpoint: Checkpoint, scores: ScoreFile, plan: Plan) -> None:
    """Refuse to tune what cannot be tuned here.

    Raises:
        UsageError: the model or its norms are not ours to tune, or the text is not here.
    """
    if plan.tune_seconds is None:
        return
    if "base_gguf" in plan.options:
        raise UsageError("--tune moves norms, and those of a --base-gguf stay as they are; leave one of the two out")
    try:
        held_out_windows(checkpoint, scores, 1)
        if calibration_windows(checkpoint, scores, _WINDOW) is None:
            raise UnsupportedError("the text that the ranking was calibrated on is not here")
    except UnsupportedError as reason:
        raise UsageError(f"--tune cannot be had here: {reason}; leave it out") from reason


def tuned_numbers(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    cache: Path | None = None,
    kept: KeptRoundings | None = None,
    progress: ProgressCallback = silent,
) -> Tuned | None:
    """Tune what ``plan`` asks to be tuned, and :func:`check_tuning` has let through; ``None``: it asks for nothing.

    Args:
        cache, kept: as :class:`acip_export.materialization.PlannedModel`; with ``kept`` a stopped run goes on.
    """
    if plan.tune_seconds is None:
        return None
    text = calibration_windows(checkpoint, scores, _WINDOW)
    assert text is not None
    import torch

    from acip_export.lowrank.cache import FactorCache
    from acip_export.materialization.rounded_weights import RoundedWeights
    from acip_export.measurement.tuning import tune

    written_as = export_format(plan.format)
    known = rounding_scores(checkpoint.with_options(plan.options), scores)
    feedback_types = written_as.feedback_types if plan.rounding == "feedback" else frozenset()
    weights = RoundedWeights(checkpoint, known, written_as.round_trip, feedback_types, FactorCache(cache), kept)
    held_out, _ = held_out_windows(checkpoint, scores, 2)
    return tune(
        checkpoint,
        weights,
        plan,
        written_as.tunable_types,
        torch.from_numpy(text),
        held_out,
        plan.tune_seconds,
        None if kept is None else kept.state("tuning", numbers_sha256(plan)),
        progress,
    )
