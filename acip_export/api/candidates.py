"""The plan that measured best, of several that the prediction cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from acip_export.api.calibration import held_out_windows, rounded_weights
from acip_export.artifacts.plan import MeasuredCandidate, Plan, plan_sha256
from acip_export.artifacts.plan_losses import PlanLoss, PlanLosses, cache_file, load_plan_losses, save_plan_losses
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import AcipError, MissingExtraError, UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.io.kept_states import states_beside
from acip_export.planning import Budget, Problem, variations
from acip_export.progress import ProgressCallback, silent
from acip_export.rounding.quantizer import FEEDBACK_VERSION
from acip_export.version import made_by

if TYPE_CHECKING:
    from torch import Tensor

_PREDICTED = "predicted best"


def measured_best(
    scores: ScoreFile, problem: Problem, budget: Budget, plan: Plan, count: int, progress: ProgressCallback = silent
) -> Plan:
    """Return the plan of least measured divergence among ``plan`` and ``count - 1`` others that predict nearly as well.

    All of them run on held-out text, from rounded weights in memory; what was measured is kept beside the score file,
    and so are unfinished passes. One that does not run is reported, not returned; where none can be run here, ``plan``
    says so in its notes.
    """
    others = sorted(variations(problem, budget, plan), key=lambda named: named[1].predicted_loss)[: count - 1]
    named = [(_PREDICTED, plan), *others]
    checkpoint = problem.checkpoint
    try:
        windows, text_sha256 = held_out_windows(checkpoint, scores, len(named))
    except (MissingExtraError, UnsupportedError) as reason:
        return replace(plan, notes=(*plan.notes, f"no other plan was compared with it: {reason}"))
    nothing = PlanLosses(plan.format, _made_by(plan), scores.sha256, text_sha256, windows.numel())
    found = _measured(scores, problem, [each for _, each in named], windows, nothing, progress)
    compared = tuple(
        MeasuredCandidate(change, each.predicted_loss, failure=str(result))
        if isinstance(result, AcipError)
        else MeasuredCandidate(change, each.predicted_loss, result.measured, result.error)
        for (change, each), result in zip(named, found, strict=True)
    )
    ran = [index for index, each in enumerate(compared) if each.measured_loss is not None]
    best = min(ran, key=lambda index: compared[index].measured_loss or 0.0, default=0)
    shipped = named[best][1]
    return replace(shipped, candidates=compared, notes=(*shipped.notes, _note(compared, best, plan.loss_unit)))


def _measured(
    scores: ScoreFile,
    problem: Problem,
    plans: Sequence[Plan],
    windows: Tensor,
    nothing: PlanLosses,
    progress: ProgressCallback,
) -> list[PlanLoss | AcipError]:
    """Return what each plan loses on ``windows``, or why it does not run; what is not known yet is measured."""
    cache = None if scores.file is None else cache_file(scores.file, nothing.format)
    losses = load_plan_losses(cache, nothing)
    keys = [plan_sha256(plan) for plan in plans]
    unknown = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in losses.plans}
    failures: dict[str, AcipError] = {}
    if unknown:
        from acip_export.measurement.plans import measure_plans

        weights = rounded_weights(problem.checkpoint, scores, problem.space)
        text = f"text {losses.text_sha256}, windows {tuple(windows.shape)}"
        origin = f"{losses.quantizer}\nscores {losses.scores_sha256}\n{text}\n{' '.join(unknown)}"
        with states_beside(cache, origin) as kept:
            found = measure_plans(problem.checkpoint, weights, list(unknown.values()), windows, progress, kept)
            for key, result in zip(unknown, found, strict=True):
                if isinstance(result, AcipError):
                    failures[key] = result
                else:
                    losses = replace(losses, plans={**losses.plans, key: PlanLoss(result.kl, result.error)})
            if cache is not None:
                save_plan_losses(losses, cache)
    return [failures[key] if key in failures else losses.plans[key] for key in keys]


def _made_by(plan: Plan) -> str:
    """What figures follow from beside plan, scores and text."""
    quantizer = export_format(plan.format, plan.serving.backend).quantizer()
    return made_by(f"torch {version('torch')}", quantizer, f"feedback {FEEDBACK_VERSION}")


def _note(compared: tuple[MeasuredCandidate, ...], best: int, unit: str) -> str:
    listed = "; ".join(
        f"{each.change}: {each.failure}" if each.measured_loss is None else f"{each.change} {each.measured_loss:.4f}"
        for each in compared
    )
    return f"measured on held-out text, {unit}: {listed}. This is the plan {compared[best].change!r}"
