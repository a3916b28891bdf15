"""What would make a plan better, or an infeasible budget fit. Every figure is planned, none is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import Alternative, Plan, Serving
from acip_export.errors import InfeasibleBudgetError, UnsupportedError, UsageError
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.problem import Floor, Problem
from acip_export.units import format_bytes

# Less than a paragraph of context is of no use, and a smaller batch frees next to nothing.
_LEAST_CONTEXT = 64
_LEAST_BATCH = 8
_MOST_SUGGESTIONS = 3
# A part of the memory that takes less than this share of the budget holds nothing back.
_NOTEWORTHY = 0.02


@dataclass(frozen=True)
class Suggestion:
    """Flags that change what was asked for, and the smallest budget that then has a plan."""

    flags: str
    floor: int

    def line(self) -> str:
        """Return the suggestion as a line of the message."""
        return f"  {self.flags:<50}{format_bytes(self.floor):>10} and more"


def infeasible(
    problem: Problem, budget: Budget, rule: ServingRule, floor: Floor, other_formats: Sequence[Suggestion] = ()
) -> InfeasibleBudgetError:
    """Explain that no plan fits: the floor, its parts, and settings and formats for which a plan was found to fit."""
    largest = max(floor.parts, key=lambda part: floor.parts[part])
    parts = "\n".join(f"  {name:<28}{format_bytes(size):>10}" for name, size in floor.parts.items() if size)
    fitting = [*_fitting(problem, budget, rule), *(each for each in other_formats if each.floor <= budget.nbytes)]
    format_ = problem.space.format.name
    advice = (
        "\n".join(("These settings fit:", *(suggestion.line() for suggestion in fitting)))
        if fitting
        else f"No context, cache type, prompt batch or type of {format_} makes it fit, and no other format."
    )
    return InfeasibleBudgetError(
        f"no plan fits {format_bytes(budget.nbytes)} ({budget.nbytes} bytes).\n"
        f"The smallest feasible budget is {floor.nbytes} bytes ({format_bytes(floor.nbytes)}), most of it {largest}:\n"
        f"{parts}\n{advice}\nOr  --budget {floor.nbytes}B",
        floor.nbytes,
    )


def alternatives(problem: Problem, budget: Budget, plan: Plan) -> tuple[Alternative, ...]:
    """Return settings that leave more room for weights and give a better plan, where that room is worth anything."""
    if plan.certificate.next_upgrade is None or budget.scope == "file":
        return ()
    better = []
    for flags, serving in _leaner(problem, plan, _NOTEWORTHY * budget.nbytes):
        changed = problem.plan(budget, serving, exact=False)
        if changed.predicted_loss < plan.predicted_loss:
            better.append(Alternative(flags, changed.predicted_loss, changed.predicted_perplexity))
    return tuple(better)


def _leaner(problem: Problem, plan: Plan, noteworthy: float) -> Iterator[tuple[str, Serving]]:
    """Yield flags, and the serving that they ask for, that shrink a part of at least ``noteworthy`` bytes."""
    if not problem.checkpoint.shape.generates:
        return
    serving = plan.serving
    if plan.breakdown["kv_cache"] > noteworthy:
        cache = _smaller_cache(problem, serving.cache_type)
        if cache is not None:
            yield f"--cache-type {cache}", replace(serving, cache_type=cache)
        if serving.context > _LEAST_CONTEXT:
            half = serving.context // 2
            yield f"--context {half}", replace(serving, context=half, prompt_batch=min(half, serving.prompt_batch))
    if plan.breakdown["compute"] + plan.breakdown["output"] > noteworthy and serving.prompt_batch > _LEAST_BATCH:
        yield f"--prompt-batch {_LEAST_BATCH}", replace(serving, prompt_batch=_LEAST_BATCH)


@dataclass(frozen=True)
class _Change:
    """A change of what was asked for; of each ``kind`` the first that fits is suggested."""

    kind: str
    flags: str
    problem: Problem
    rule: ServingRule


def _fitting(problem: Problem, budget: Budget, rule: ServingRule) -> Iterator[Suggestion]:
    """Yield at most one change of each kind that makes the budget fit."""
    kinds: set[str] = set()
    for change in _changes(problem, budget, rule):
        if len(kinds) == _MOST_SUGGESTIONS:
            return
        if change.kind in kinds:
            continue
        try:
            serving = change.rule.serving(budget, change.problem.memory)
            floor = change.problem.floor(budget.scope, serving).nbytes
        except (UsageError, UnsupportedError):
            continue  # the change is not possible, so it is no suggestion
        if floor <= budget.nbytes:
            kinds.add(change.kind)
            yield Suggestion(change.flags, floor)


def _changes(problem: Problem, budget: Budget, rule: ServingRule) -> Iterator[_Change]:
    """Yield changes of types and settings, the least intrusive first."""
    space = problem.space
    if space.types != space.default_types:
        try:
            with_defaults = problem.with_types(space.default_types)
        except (UsageError, UnsupportedError):
            pass  # the model cannot take them
        else:
            names = ",".join(type_.name for type_ in space.default_types)
            yield _Change("types", f"--types {names}", with_defaults, rule)
    if budget.scope == "file":
        return
    cache = _smaller_cache(problem, rule.cache_type)
    if cache is not None:
        yield _Change("cache", f"--cache-type {cache}", problem, replace(rule, cache_type=cache))
    if not problem.checkpoint.shape.generates:
        return
    small_batch = replace(rule, prompt_batch=_LEAST_BATCH)
    if rule.serving(budget, problem.memory).prompt_batch > _LEAST_BATCH:
        yield _Change("batch", f"--prompt-batch {_LEAST_BATCH}", problem, small_batch)
    for context in _shorter(rule.context):
        yield _Change("context", f"--context {context}", problem, replace(rule, context=context))
    if cache is not None:
        for context in _shorter(rule.context):
            flags = f"--context {context} --cache-type {cache} --prompt-batch {_LEAST_BATCH}"
            yield _Change("all", flags, problem, replace(small_batch, context=context, cache_type=cache))


def _shorter(context: int) -> Iterator[int]:
    while context > _LEAST_CONTEXT:
        context //= 2
        yield context


def _smaller_cache(problem: Problem, cache_type: str) -> str | None:
    """Return the smallest cache type, if it is smaller than ``cache_type``."""
    sizes = {name: numerator / bits for name, (numerator, bits) in problem.space.format.cache_types.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    return smallest if sizes[smallest] < sizes[cache_type] else None
