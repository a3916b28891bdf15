"""The plan that measured best, of several that the prediction cannot tell apart."""

from __future__ import annotations

from dataclasses import replace

from acip_export.api.calibration import held_out_windows, rounded_weights
from acip_export.artifacts.plan import MeasuredCandidate, Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import AcipError, MissingExtraError, UnsupportedError
from acip_export.planning import Budget, Problem, variations
from acip_export.progress import ProgressCallback, silent

_PREDICTED = "predicted best"


def measured_best(
    scores: ScoreFile, problem: Problem, budget: Budget, plan: Plan, count: int, progress: ProgressCallback = silent
) -> Plan:
    """Return the plan of least measured divergence among ``plan`` and ``count - 1`` others that predict nearly as well.

    All of them run on held-out text, from rounded weights in memory. One that does not run is reported, not returned;
    where none can be run here, ``plan`` says so in its notes.
    """
    others = sorted(variations(problem, budget, plan), key=lambda named: named[1].predicted_loss)[: count - 1]
    named = [(_PREDICTED, plan), *others]
    checkpoint = problem.checkpoint
    try:
        windows, _ = held_out_windows(checkpoint, scores, len(named))
    except (MissingExtraError, UnsupportedError) as reason:
        return replace(plan, notes=(*plan.notes, f"no other plan was compared with it: {reason}"))
    from acip_export.measurement.plans import measure_plans

    weights = rounded_weights(checkpoint, scores, problem.space)
    found = measure_plans(checkpoint, weights, [each for _, each in named], windows, progress)
    compared = tuple(
        MeasuredCandidate(change, each.predicted_loss, failure=str(result))
        if isinstance(result, AcipError)
        else MeasuredCandidate(change, each.predicted_loss, result.kl, result.error)
        for (change, each), result in zip(named, found, strict=True)
    )
    ran = [index for index, each in enumerate(compared) if each.measured_loss is not None]
    best = min(ran, key=lambda index: compared[index].measured_loss or 0.0, default=0)
    shipped = named[best][1]
    return replace(shipped, candidates=compared, notes=(*shipped.notes, _note(compared, best, plan.loss_unit)))


def _note(compared: tuple[MeasuredCandidate, ...], best: int, unit: str) -> str:
    listed = "; ".join(
        f"{each.change}: {each.failure}" if each.measured_loss is None else f"{each.change} {each.measured_loss:.4f}"
        for each in compared
    )
    return f"measured on held-out text, {unit}: {listed}. This is the plan {compared[best].change!r}"
