"""From a score file and a budget to a plan; sweeps over budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from acip_export.api.progress import ProgressCallback, StageProgress, quiet
from acip_export.api.rank import rounding_scores
from acip_export.api.rounding import rounding_errors
from acip_export.artifacts.names import SWEEP
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import AcipError, InfeasibleBudgetError, MissingExtraError, UnsupportedError
from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat
from acip_export.formats.registry import export_format, format_names
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import (
    PlanRequest,
    PredictFiles,
    Problem,
    SweepLine,
    choose_context,
    make_plan,
    preset_points,
    sweep,
)
from acip_export.units import format_bytes


def planning_problem(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, progress: ProgressCallback = quiet
) -> Problem:
    """What all budgets of ``request``'s target, layout and types share: measured rounding errors, exact file sizes.

    Raises as :func:`acip_export.planning.make_plan`, but for the budget.
    """
    target = export_format(request.format, request.backend)
    layout = target.layouts_for(request.layout, request.runtime)[0].name
    request = replace(request, layout=layout)
    checkpoint = checkpoint.with_options(request.options)
    _prepare(target, checkpoint, request, progress)
    return Problem.of(
        checkpoint,
        scores,
        request,
        _prediction(target, checkpoint, layout),
        rounding_errors(checkpoint, scores, request, progress),
    )


def plan_export(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, progress: ProgressCallback = quiet
) -> Plan:
    """Plan with measured rounding errors and the exact file sizes of the target's converter; with the layout ``auto``,
    the best predicted of all.

    Raises as :func:`acip_export.planning.make_plan`; with ``auto`` only if no layout has a plan. And
        UnsupportedError: a file would be larger than ``request.largest_file``.
    """
    target = export_format(request.format, request.backend)
    target.check_options(request.options)
    layouts = target.layouts_for(request.layout, request.runtime)
    checkpoint = checkpoint.with_options(request.options)
    rounding_scores(checkpoint, scores)  # an unfit imatrix is refused before anything is computed
    notes = _prepare(target, checkpoint, request, progress)

    def plan(layout: str) -> Plan:
        asked, predict = replace(request, layout=layout), _prediction(target, checkpoint, layout)
        if (
            target.tensor_limit(request.options) is not None
        ):  # one that is too small is refused before anything is measured
            Problem.of(checkpoint, scores, asked, predict).floor(asked)
        errors = rounding_errors(checkpoint, scores, asked, progress)
        made = make_plan(checkpoint, scores, asked, predict, errors, lambda: other_floors(checkpoint, scores, request))
        return replace(made, notes=(*made.notes, *notes))

    if len(layouts) == 1:
        return _loadable(plan(layouts[0].name), request)
    plans: list[Plan] = []
    refusals: list[InfeasibleBudgetError] = []
    unsupported: list[UnsupportedError] = []
    for layout in layouts:
        try:
            plans.append(plan(layout.name))
        except InfeasibleBudgetError as error:
            refusals.append(error)
        except UnsupportedError as error:
            unsupported.append(error)
    if not plans:
        if refusals:
            raise min(refusals, key=lambda error: error.smallest_feasible_bytes)
        raise unsupported[0]
    best = min(plans, key=lambda made: made.predicted_loss)
    compared = ", ".join(f"{made.layout} {made.predicted_loss:.4f}" for made in plans)
    best = replace(best, notes=(*best.notes, f"predicted loss by layout: {compared} {best.loss_unit}"))
    return _loadable(best, request)


def _loadable(plan: Plan, request: PlanRequest) -> Plan:
    """``plan``, if the device loads files as large as its own."""
    name, size = max(plan.files.items(), key=lambda item: item[1])
    if request.largest_file is not None and size > request.largest_file:
        raise UnsupportedError(
            f"{name} would have {format_bytes(size)}, and {request.device or 'the device'} loads files of at most "
            f"{format_bytes(request.largest_file)}.\nPlan for smaller files, for example with  "
            f"--budget-scope file --budget {request.largest_file / 1e9:g}GB"
        )
    return plan


def other_floors(checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest) -> list[tuple[str, int]]:
    """Flags for every other format, and its smallest budget in the same scope and for the same context.

    Formats that the model or the installation does not support are left out. What only the requested format knows of
    (types, layout and the like) falls to the other's defaults, and the flags say so.
    """
    own = {
        "types": request.types,
        "layout": request.layout,
        "cache-type": request.cache_type,
        "runtime": request.runtime,
        "format": request.backend,
        **{name.replace("_", "-"): value for name, value in request.options.items()},
    }
    without = ", ".join(f"--{name}" for name, value in own.items() if value)
    found: list[tuple[str, int]] = []
    for name in format_names():
        if name != request.format:
            changed = replace(
                request, format=name, types=(), layout=None, cache_type=None, runtime=None, backend=None, options={}
            )
            try:
                floor = _floor(checkpoint.with_options({}), scores, changed)
            except AcipError:
                continue
            found.append((f"--format {name}" + (f"  without {without}" if without else ""), floor))
    return found


def _floor(checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest) -> int:
    """The smallest budget, which needs no rounding errors. Raises as :func:`plan_export`, but for the budget."""
    target = export_format(request.format)
    layout = target.layouts[0].name
    asked = replace(request, layout=layout)
    return Problem.of(checkpoint, scores, asked, _prediction(target, checkpoint, layout)).floor(asked)[0]


def _prediction(target: ExportFormat, checkpoint: Checkpoint, layout: str) -> PredictFiles:
    return lambda tensors, runtime: target.predict_files(checkpoint, layout, tensors, runtime)


def _prepare(
    target: ExportFormat, checkpoint: Checkpoint, request: PlanRequest, progress: ProgressCallback
) -> tuple[str, ...]:
    return target.prepare(
        checkpoint,
        request.backend or DEFAULT_BACKEND,
        choose_context(checkpoint, request),
        lambda p: progress(StageProgress("graph", p.done, p.total, p.item)),
    )


def sweep_sizes(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    requests: Sequence[tuple[str, PlanRequest]],
    progress: ProgressCallback = quiet,
) -> list[SweepLine]:
    """The curve of sizes against predicted quality for every labelled request; the first of a target has its presets.

    Requests that the model or the installation does not support are left out, unless none is supported.

    Raises:
        UnsupportedError, MissingExtraError: of the first request, when no line could be made.
    """
    lines: list[SweepLine] = []
    refusals: list[AcipError] = []
    for label, request in requests:
        try:
            problem = planning_problem(checkpoint, scores, request, progress)
            line = sweep(problem, request, label, progress=_steps_of(label, progress))
        except (UnsupportedError, MissingExtraError) as error:
            refusals.append(error)
            continue
        first = all(line.format != other.format for other in lines)
        lines.append(replace(line, presets=preset_points(problem, request)) if first else line)
    if not lines:
        raise refusals[0]
    return lines


def _steps_of(stage: str, progress: ProgressCallback) -> Callable[[int, int], None]:
    return lambda done, total: progress(StageProgress(stage, done, total, ""))


def sweep_document(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    requests: Sequence[tuple[str, PlanRequest]],
    lines: Sequence[SweepLine],
) -> dict[str, Any]:
    """What a sweep is written as; docs/plan.md describes it."""
    request = requests[0][1]
    return {
        "artifact": SWEEP.artifact,
        "version": SWEEP.version,
        "model": checkpoint.name,
        "model_fingerprint": checkpoint.fingerprint,
        "scores_sha256": scores.sha256,
        "dense_bytes": checkpoint.weight_bytes,
        "scope": request.budget_scope,
        "loss_unit": scores.loss_unit,
        "lines": [asdict(line) for line in lines],
    }


def planned_sizes(
    checkpoint: Checkpoint, scores: ScoreFile, plan: Plan, types: tuple[str, ...] = (), count: int = 16
) -> tuple[Plan, ...]:
    """Plans at ``count`` budgets, from the smallest feasible one to the largest that is of use, for the same runtime.

    Args:
        types: that ``plan`` chose from, if not the target's own.
    """
    base = PlanRequest(
        format=plan.format,
        budget_bytes=1,
        budget_scope=plan.budget_scope,
        layout=plan.layout,
        types=types,
        context=plan.serving.context,
        cache_type=plan.serving.cache_type,
        backend=plan.serving.backend,
        prompt_batch=plan.serving.prompt_batch,
        options=plan.options,
    )
    problem = planning_problem(checkpoint, scores, base)
    smallest, _ = problem.floor(base)
    full = problem.plan(replace(base, budget_bytes=2**62), exact=False)
    largest = full.used_bytes
    made: dict[int, Plan] = {}
    for step in range(count - 1):
        # Equal factors: most of what happens to quality happens at the small sizes.
        budget = round(smallest * (largest / smallest) ** (step / (count - 1)))
        found = problem.plan(replace(base, budget_bytes=max(budget, smallest)), exact=False)
        made[found.used_bytes] = found
    made[largest] = replace(full, budget_bytes=largest, certificate=replace(full.certificate, bytes_left=0))
    return tuple(made[used] for used in sorted(made))
