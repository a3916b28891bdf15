"""Why a plan is not better, and what would make an infeasible budget fit. Every figure is planned, none is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from acip_export.artifacts.plan import Alternative, Certificate, Plan, Refusal
from acip_export.errors import AcipError, InfeasibleBudgetError
from acip_export.units import format_bytes

if TYPE_CHECKING:
    from acip_export.planning.planner import PlanRequest, Problem

# Nobody is helped by less.
_LEAST_CONTEXT = 64
_MOST_SUGGESTIONS = 3
# A part of the memory that takes less than this share of the budget holds nothing back.
_NOTEWORTHY = 0.02


def explain(problem: Problem, request: PlanRequest, plan: Plan) -> Certificate:
    """The plan's certificate with what other settings would give, and the types that tensors could not take."""
    return replace(
        plan.certificate,
        alternatives=_alternatives(problem, request, plan),
        refused_types=refused_types(problem, request),
    )


def infeasible(problem: Problem, request: PlanRequest) -> InfeasibleBudgetError:
    """The floor, its breakdown, and settings and other formats for which a plan was found to fit."""
    needed, parts = problem.floor(request)
    largest = max(parts, key=lambda part: parts[part])
    lines = "\n".join(f"  {name:<28}{format_bytes(size):>10}" for name, size in parts.items() if size)
    fitting: list[str] = []
    kinds: set[str] = set()
    for kind, change, changed in _changes(problem, request):
        if kind in kinds or len(fitting) == _MOST_SUGGESTIONS:
            continue
        floor = _floor(problem, changed, kind == "types")
        if floor is not None and floor <= request.budget_bytes:
            kinds.add(kind)
            fitting.append(f"  {change:<50}{format_bytes(floor):>10} and more")
    for change, floor in problem.other_floors():
        if floor <= request.budget_bytes:
            fitting.append(f"  {change:<50}{format_bytes(floor):>10} and more")
    found = (
        "These settings fit:\n" + "\n".join(fitting)
        if fitting
        else f"No context, cache type, prompt batch or type of {problem.format.name} makes it fit, and no other format."
    )
    return InfeasibleBudgetError(
        f"no plan fits {format_bytes(request.budget_bytes)} ({request.budget_bytes} bytes).\n"
        f"The smallest feasible budget is {needed} bytes ({format_bytes(needed)}), most of it {largest}:\n{lines}\n"
        f"{found}\nOr  --budget {needed}B",
        needed,
    )


def _floor(problem: Problem, request: PlanRequest, other_types: bool) -> int | None:
    from acip_export.planning.planner import Problem as Problems

    try:
        if other_types:
            problem = Problems.of(problem.checkpoint, problem.scores, request, problem.predict_files)
        return problem.floor(request)[0]
    except AcipError:
        return None  # the change is not possible, so it is no suggestion


def _changes(problem: Problem, request: PlanRequest) -> Iterator[tuple[str, str, PlanRequest]]:
    """Kind of change, flags, and the request with them, the least intrusive first."""
    serving, _ = problem.settings(request)
    if request.types:
        names = ",".join(problem.format.types)
        yield "types", f"--types {names}", replace(request, types=problem.format.types)
    if request.budget_scope == "file":
        return
    cache = _smaller_cache(problem, serving.cache_type)
    if cache is not None:
        yield "cache", f"--cache-type {cache}", replace(request, cache_type=cache)
    if problem.checkpoint.shape.generates:
        if serving.prompt_batch > 8:
            yield "batch", "--prompt-batch 8", replace(request, prompt_batch=8)
        for context in _shorter(serving.context):
            yield "context", f"--context {context}", replace(request, context=context)
        if cache is not None:
            for context in _shorter(serving.context):
                both = replace(request, context=context, cache_type=cache, prompt_batch=8)
                yield "all", f"--context {context} --cache-type {cache} --prompt-batch 8", both


def _shorter(context: int) -> Iterator[int]:
    while context > _LEAST_CONTEXT:
        context //= 2
        yield context


def _smaller_cache(problem: Problem, cache_type: str) -> str | None:
    sizes = {name: numerator / bits for name, (numerator, bits) in problem.format.cache_types.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    return smallest if sizes[smallest] < sizes[cache_type] else None


def _alternatives(problem: Problem, request: PlanRequest, plan: Plan) -> tuple[Alternative, ...]:
    """Settings that leave more room for weights, where that room is worth anything."""
    if plan.certificate.next_upgrade is None or request.budget_scope == "file":
        return ()
    changes: list[tuple[str, PlanRequest]] = []
    serving, least = plan.serving, _NOTEWORTHY * request.budget_bytes
    same = replace(request, context=serving.context, prompt_batch=serving.prompt_batch)
    if plan.breakdown["kv_cache"] > least and problem.checkpoint.shape.generates:
        cache = _smaller_cache(problem, serving.cache_type)
        if cache is not None:
            changes.append((f"--cache-type {cache}", replace(same, cache_type=cache)))
        if serving.context > _LEAST_CONTEXT:
            half = serving.context // 2
            changes.append(
                (f"--context {half}", replace(same, context=half, prompt_batch=min(half, serving.prompt_batch)))
            )
    buffers = plan.breakdown["compute"] + plan.breakdown["output"]
    if buffers > least and serving.prompt_batch > 8 and problem.checkpoint.shape.generates:
        changes.append(("--prompt-batch 8", replace(same, prompt_batch=8)))
    found = []
    for change, changed in changes:
        better = problem.plan(changed, exact=False)
        if better.predicted_loss < plan.predicted_loss:
            found.append(Alternative(change, better.predicted_loss, better.predicted_perplexity))
    return tuple(found)


def refused_types(problem: Problem, request: PlanRequest) -> tuple[Refusal, ...]:
    """Types that were allowed and that some matrices cannot take, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    limit = problem.format.tensor_limit(request.options)
    for candidate in problem.candidates:
        first = candidate.options[0]
        if len(first.shape) != 2:
            continue
        offered = {option.type for option in candidate.options if option.rank is None}
        for form in problem.format.choose_types(request.types):
            if form.name in offered:
                continue
            rows, columns = first.shape
            if not form.fits(columns):
                reason = f"rows of {columns} weights are no multiple of blocks of {form.block}"
            elif limit is not None and form.nbytes(rows, columns) > limit.nbytes:
                reason = limit.reason
            else:
                reason = "this format has no such embeddings, heads or tables"
            reasons.setdefault((form.name, reason), []).append(candidate.name)
    return tuple(Refusal(name, len(tensors), tensors[0], why) for (name, why), tensors in reasons.items())
