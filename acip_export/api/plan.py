"""From a score file and a budget to a plan; sweeps over budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from acip_export.api.cache_types import (
    cache_names,
    chosen_cache_note,
    known_cache_losses,
    measured_cache_losses,
    with_cache_to_choose,
)
from acip_export.api.calibration import calibrated_errors
from acip_export.api.candidates import measured_best
from acip_export.api.rank import rounding_scores
from acip_export.api.rounding_errors import rounding_errors, settle_rounding
from acip_export.artifacts.cache_losses import CacheLosses
from acip_export.artifacts.names import SWEEP
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import (
    AcipError,
    CheckpointError,
    MissingExtraError,
    OutputError,
    UnacceptedLossError,
    UnreachableSpeedError,
    UnsupportedError,
    UsageError,
)
from acip_export.formats.protocol import ExportFormat
from acip_export.formats.registry import export_format, format_names
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.notes import model_notes
from acip_export.model.opening import check_checkpoint
from acip_export.planning import (
    Budget,
    DoesNotFit,
    Floor,
    PlanRequest,
    Problem,
    Question,
    SearchSpace,
    ServingRule,
    Suggestion,
    SweepLine,
    check_pace,
    infeasible,
    make_plan,
    preset_points,
    resolve,
    sweep,
    undominated_caches,
    with_best_cache,
)
from acip_export.progress import ProgressCallback, silent
from acip_export.units import format_bytes

# What all budgets of a request share, by layout: the problem, whether it is calibrated, and why not.
Known = dict[str, tuple[Problem, bool, tuple[str, ...]]]


def planning_problem(
    checkpoint: Checkpoint, scores: ScoreFile, question: Question, progress: ProgressCallback = silent
) -> Problem:
    """Make what all budgets of a question's first search space share: measured losses, exact file sizes.

    Raises:
        ScoreFileError: the score file is of another model.
        UsageError, UnsupportedError: the model cannot be exported with these types.
        MissingExtraError: a package that the prediction of files needs is not installed.
    """
    space = possible_with(scores, question)[0].spaces[0]
    checkpoint = checkpoint.with_options(space.options)
    _prepare(checkpoint, space.format, question.rule, progress)
    errors = rounding_errors(checkpoint, scores, space, progress)
    if question.calibrate:
        errors, _ = calibrated_errors(checkpoint, scores, space, errors, question.rule, progress)
    return Problem.of(checkpoint, scores, space, errors, _cache_losses(checkpoint, scores, space, question, progress))


def _cache_losses(
    checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace, question: Question, progress: ProgressCallback
) -> CacheLosses:
    """Return what types of KV cache cost; where there is a choice, what is not known yet is measured."""
    if len(question.caches) == 1:
        return known_cache_losses(scores, space)
    return measured_cache_losses(checkpoint, scores, space, cache_names(question.caches), progress)


def possible_with(scores: ScoreFile, question: Question) -> tuple[Question, tuple[str, ...]]:
    """Leave pairs and corrections out of a question where the score file has nothing to make them from.

    Returns:
        The question, and what the user has to know about it, a sentence each.

    Raises:
        UsageError: its layout is made of them.
    """
    if not scores.slim:
        return question, ()
    spaces = [space for space in question.spaces if space.layout.low_rank is None and not space.layout.residual_pairs]
    if not spaces:
        space = question.spaces[0]
        plain = [layout.name for layout in space.format.layouts if layout.low_rank is None]
        if plain:
            raise UsageError(
                f"layout {space.layout.name} is made of factor pairs, and the score file is slim: it has no second "
                f"moments to make them from.\nMake one that has:  {scores.whole_again}\nor use  --layout {plain[0]}"
            )
        spaces = [replace(space, layout=replace(space.layout, low_rank=None, residual_pairs=()))]
    note = f"no factor pairs: the score file is slim; {scores.whole_again}  makes one that can make them"
    return replace(question, spaces=tuple(spaces)), (note,) if spaces != list(question.spaces) else ()


def plan_export(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    request: PlanRequest,
    progress: ProgressCallback = silent,
    known: Known | None = None,
) -> Plan:
    """Plan with measured rounding errors and the exact file sizes of the format; with the layout ``auto``,
    the best predicted of all.

    Args:
        known: what other budgets of the same request have made; what is made is added.

    Raises:
        UnacceptedLossError: no context of ``max`` has a plan that loses as little as was asked for.
        UnreachableSpeedError: no plan is as fast as was asked for.
        InfeasibleBudgetError: no layout has a plan that fits; names the smallest budget that does, what dominates it,
            and what would fit.
        ScoreFileError: the score file is of another model.
        UsageError, UnsupportedError: the request contradicts itself, the model, the scores or the format; or a file
            would be larger than ``request.largest_file``.
    """
    known = {} if known is None else known
    request, said = settle_rounding(scores, request)
    question, limits = possible_with(scores, resolve(request, checkpoint))
    budget, rule = question.budget, question.rule
    checkpoint = checkpoint.with_options(request.options)
    rounding_scores(checkpoint, scores)  # an unfit imatrix is refused before anything is computed
    notes = [*said, *limits, *_prepare(checkpoint, question.spaces[0].format, rule, progress)]
    bare: dict[str, Problem] = {}

    def unmeasured(space: SearchSpace) -> Problem:
        """What bytes follow from, before minutes of measuring, which change none."""
        layout = space.layout.name
        if layout in known:
            return known[layout][0]
        if layout not in bare:
            bare[layout] = Problem.of(checkpoint, scores, space)
        return bare[layout]

    default = question
    question = with_cache_to_choose(checkpoint, scores, request, question, unmeasured, progress)

    def problem_of(space: SearchSpace) -> Problem:
        if space.layout.name not in known:
            known[space.layout.name] = made(space)
        problem, scaled, why_not = known[space.layout.name]
        notes.extend(note for note in why_not if note not in notes)
        calibrated.append(scaled)
        # Another budget may have had no choice of cache types.
        losses = _cache_losses(checkpoint, scores, space, question, progress)
        if losses != problem.cache_losses:
            problem = replace(problem, cache_losses=losses)
            known[space.layout.name] = problem, scaled, why_not
        return problem

    def made(space: SearchSpace) -> tuple[Problem, bool, tuple[str, ...]]:
        errors, why_not = rounding_errors(checkpoint, scores, space, progress), tuple[str, ...]()
        uncalibrated = errors
        if question.calibrate:
            errors, why_not = calibrated_errors(checkpoint, scores, space, errors, rule, progress)
        return Problem.of(checkpoint, scores, space, errors), errors is not uncalibrated, why_not

    calibrated: list[bool] = []
    plans: list[tuple[Plan, Problem]] = []
    refused: list[tuple[Floor, Problem]] = []
    refusals: list[UnacceptedLossError | UnreachableSpeedError | UnsupportedError] = []
    for space in question.spaces:
        try:
            if space.layout.name not in known:
                problem = unmeasured(space)
                _refuse_what_nothing_fits(problem, budget, rule, question.caches)
                if len(question.caches) == 1:  # of several, which is read is not known
                    check_pace(problem, budget, rule.least.serving(budget, problem.memory), question.pace)
            problem = problem_of(space)
            chosen = with_best_cache(problem, budget, rule, question.caches)
            plans.append((make_plan(problem, budget, chosen, question.pace), problem))
        except DoesNotFit as reason:
            refused.append((reason.floor, problem))
        except (UnacceptedLossError, UnreachableSpeedError, UnsupportedError) as reason:
            refusals.append(reason)
    if not plans:
        if not refused:
            raise refusals[0]
        floor, problem = min(refused, key=lambda each: each[0].nbytes)
        raise infeasible(problem, budget, rule.least, floor, other_requests(checkpoint, scores, request))
    # With a context to be found, the longest.
    best, problem = min(plans, key=lambda each: (-each[0].serving.context, each[0].predicted_loss))
    if request.candidates > 1:
        best = measured_best(scores, problem, budget, best, request.candidates, progress)
    if len(question.spaces) > 1:
        compared = ", ".join(f"{plan.layout} {plan.predicted_loss:.4f}" for plan, _ in plans)
        notes.append(f"predicted loss by layout: {compared} {best.loss_unit}")
    if question is not default:
        notes.extend(chosen_cache_note(problem, default, best))
    notes.extend(_untuned_note(best, request))
    notes = [*filter(None, [best.far_off]), *best.notes, *notes, *model_notes(checkpoint, best.serving.context)]
    if request.device is not None:  # has no more memory to give
        better = tuple(each for each in best.certificate.alternatives if not each.change.startswith("--budget"))
        best = replace(best, certificate=replace(best.certificate, alternatives=better))
    scaled = calibrated != [] and all(calibrated)
    return _loadable(
        replace(best, device=request.device, calibrated=scaled, notes=tuple(notes), tune_seconds=request.tune_seconds),
        request,
    )


def _untuned_note(plan: Plan, request: PlanRequest) -> Iterator[str]:
    """Suggest tuning where a plan has pairs and no adapters."""
    pairs = sum(decision.kept is not None for decision in plan.tensors)
    tunable = plan.task == "causal" and "base_gguf" not in plan.options
    if pairs and tunable and not plan.adapters and request.tune_seconds is None:
        yield f"--tune 10min  moves the plan's factor pairs ({pairs}) towards the dense model before they are rounded"


def _refuse_what_nothing_fits(
    problem: Problem, budget: Budget, rule: ServingRule, caches: Sequence[tuple[str, str]]
) -> None:
    """Raise DoesNotFit with the least of the floors, if they are all above the budget."""
    rules = [rule.least]
    if len(caches) > 1:
        rules = [replace(rule.least, cache_type_k=keys, cache_type_v=values) for keys, values in caches]
    floors = [problem.floor(budget.scope, each.serving(budget, problem.memory)) for each in rules]
    floor = min(floors, key=lambda each: each.nbytes)
    if floor.nbytes > budget.nbytes:
        raise DoesNotFit(floor)


def _loadable(plan: Plan, request: PlanRequest) -> Plan:
    """Return ``plan``, if the device loads files as large as its own."""
    name, size = max(plan.files.items(), key=lambda item: item[1])
    if request.largest_file is not None and size > request.largest_file:
        raise UnsupportedError(
            f"{name} would have {format_bytes(size)}, and {request.device or 'the device'} loads files of at most "
            f"{format_bytes(request.largest_file)}.\nPlan for smaller files, for example with  "
            f"--budget-scope file --budget {request.largest_file / 1e9:g}GB"
        )
    return plan


def other_requests(checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest) -> list[Suggestion]:
    """Return requests for smaller files, with their smallest budget in the same scope and for the same context.

    Options that keep types out of the format are left out, and every other format is asked for. Formats that the model
    or the installation does not support have no suggestion. What only the requested format knows of (types, layout and
    the like) falls to the other's defaults, and the flags say so.
    """
    suggestions: list[Suggestion] = []
    for flags, changed in (*_with_more_types(request), *_in_other_formats(request)):
        try:
            floor = _floor(checkpoint.with_options(changed.options), scores, changed)
        except OutputError:
            raise  # a full disk is nothing about a format
        except (UnsupportedError, MissingExtraError, CheckpointError, UsageError):
            continue  # CheckpointError: a tokenizer that only this format reads; UsageError: too long a context
        suggestions.append(Suggestion(flags, floor))
    return suggestions


def _with_more_types(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    format = export_format(request.format, request.backend)
    refused = format.unknown_types(request.options)
    for name in request.options:
        options = {other: value for other, value in request.options.items() if other != name}
        if len(format.unknown_types(options)) < len(refused):
            yield f"without --{name.replace('_', '-')}", replace(request, options=options)


def _in_other_formats(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    own = {
        "types": request.types,
        "layout": request.layout,
        "cache-type": request.cache_type,
        "cache-type-k": request.cache_type_k,
        "cache-type-v": request.cache_type_v,
        "runtime": request.runtime,
        "format": request.backend,
        **{name.replace("_", "-"): value for name, value in request.options.items()},
    }
    without = ", ".join(f"--{name}" for name, value in own.items() if value)
    for name in format_names():
        if name != request.format:
            changed = replace(
                request,
                format=name,
                types=(),
                layout=None,
                cache_type=None,
                cache_type_k=None,
                cache_type_v=None,
                runtime=None,
                backend=None,
                options={},
                rounding=None,
                min_speed=None,
            )
            yield f"--format {name}" + (f"  without {without}" if without else ""), changed


def _floor(checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest) -> int:
    """Return the smallest budget of the default layout, which needs no rounding errors."""
    question, _ = possible_with(scores, resolve(request, checkpoint))
    problem = Problem.of(checkpoint, scores, question.spaces[0])
    return problem.floor(question.scope, question.rule.least.serving(question.budget, problem.memory)).nbytes


def _prepare(
    checkpoint: Checkpoint, format: ExportFormat, rule: ServingRule, progress: ProgressCallback
) -> tuple[str, ...]:
    """Let the format do what is the same for all plans; return what a user has to know about this model's exports."""
    check_checkpoint(checkpoint)
    format.check_model(checkpoint)
    return format.prepare(
        checkpoint,
        rule.backend,
        rule.context,
        progress,
    )


def sweep_sizes(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    requests: Sequence[tuple[str, PlanRequest]],
    progress: ProgressCallback = silent,
) -> list[SweepLine]:
    """The curve of sizes against predicted quality for every labelled request; the first of a format has its presets.

    Requests that the model or the installation does not support are left out, unless none is supported.

    Raises:
        UnsupportedError, MissingExtraError: of the first request, when no line could be made.
    """
    questions: list[tuple[str, PlanRequest, Question]] = []
    lines: list[SweepLine] = []
    refusals: list[AcipError] = []
    for label, request in requests:  # all of them before minutes of measuring
        try:
            settled, _ = settle_rounding(scores, request)
            questions.append((label, settled, resolve(settled, checkpoint)))
        except (UnsupportedError, MissingExtraError) as error:
            refusals.append(error)
    for label, settled, resolved in questions:
        try:
            question, _ = possible_with(scores, resolved)
            made = partial(Problem.of, checkpoint.with_options(settled.options), scores)
            question = with_cache_to_choose(checkpoint, scores, settled, question, made, progress)
            problem = planning_problem(checkpoint, scores, question, progress)
            rules = undominated_caches(problem, question.rule, question.caches)
            line = sweep(problem, rules, question.scope, label, progress=progress, pace=question.pace)
        except (UnsupportedError, MissingExtraError) as error:
            refusals.append(error)
            continue
        first = all(line.format != other.format for other in lines)
        if first:
            # The most precise cache: presets are compared by their weights.
            line = replace(line, presets=preset_points(problem, rules[-1], question.scope, question.pace))
        lines.append(line)
    if not lines:
        raise refusals[0]
    return lines


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
    """Plan for ``count`` budgets, from the smallest feasible one to the largest that is of use, at the same serving.

    Args:
        types: in place of those that ``plan`` chose from.
    """
    serving, scope = plan.serving, plan.budget_scope
    request = PlanRequest(
        format=plan.format,
        budget_scope=scope,
        layout=plan.layout,
        types=types or plan.types,
        context=serving.context,
        cache_type_k=serving.cache_type_k,
        cache_type_v=serving.cache_type_v,
        backend=serving.backend,
        prompt_batch=serving.prompt_batch,
        options=plan.options,
        rounding=plan.rounding,
        calibrate=plan.calibrated,
    )
    problem = planning_problem(checkpoint, scores, resolve(request, checkpoint))
    smallest, largest = problem.floor(scope, serving).nbytes, problem.largest(scope, serving)
    plans = {}
    for step in range(count - 1):
        # Equal factors: most of what happens to quality happens at the small sizes.
        nbytes = round(smallest * (largest.used_bytes / smallest) ** (step / (count - 1)))
        smaller = problem.plan(Budget(max(nbytes, smallest), scope), serving, exact=False)
        plans[smaller.used_bytes] = smaller
    plans[largest.used_bytes] = largest
    return tuple(plans[used] for used in sorted(plans))
