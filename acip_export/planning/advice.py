"""What would make a plan better, or an infeasible budget fit. Every figure is planned, none is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import FAR_OFF, Alternative, Plan, Serving, cache_types
from acip_export.errors import InfeasibleBudgetError, UnacceptedLossError, UnsupportedError, UsageError
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.problem import Floor, Problem
from acip_export.units import format_bytes, size_name

# Less than a paragraph of context is of no use, and a smaller batch frees next to nothing.
_LEAST_CONTEXT = 64
_LEAST_BATCH = 8
_MOST_SUGGESTIONS = 3
# A part of the memory that takes less than this share of the budget holds nothing back.
_NOTEWORTHY = 0.02
# Bytes of a number in the KV cache from which on its rounding is next to nothing (docs/memory.md).
_HARMLESS_CACHE = 1.0
# How exactly the budget is looked for that a plan needs to be near the dense model.
_BUDGET_STEP = 1.03


@dataclass(frozen=True)
class Suggestion:
    """Flags that change what was asked for, and the smallest budget that then has a plan."""

    flags: str
    floor: int

    def line(self) -> str:
        """Return the suggestion as a line of the message."""
        return f"  {self.flags:<50}{format_bytes(self.floor):>10} and more"


def infeasible(
    problem: Problem, budget: Budget, rule: ServingRule, floor: Floor, others: Sequence[Suggestion] = ()
) -> InfeasibleBudgetError:
    """Explain that no plan fits: the floor, its parts, and settings and other requests that were found to fit."""
    largest = max(floor.parts, key=lambda part: floor.parts[part])
    parts = "\n".join(f"  {name:<28}{format_bytes(size):>10}" for name, size in floor.parts.items() if size)
    fitting = [*_fitting(problem, budget, rule), *(each for each in others if each.floor <= budget.nbytes)]
    smaller = _least_cache(problem, budget, rule, floor)
    cache = f" with a KV cache of {cache_types(rule.cache_type_k, rule.cache_type_v)}" if smaller else ""
    budgets = [f"  --budget {_round_up(floor.nbytes)}"]
    if smaller:
        budgets.append(f"  --budget {_round_up(smaller.floor)} {smaller.flags}")
    otherwise = f"It does not fit with {_tried(problem, budget)} either; other  --types  may, and a larger budget does:"
    advice = (
        ["These settings fit:", *(suggestion.line() for suggestion in fitting), "Or give a larger budget:"]
        if fitting
        else [otherwise]
    )
    lines = "\n".join((*advice, *budgets))
    return InfeasibleBudgetError(
        f"no plan fits {format_bytes(budget.nbytes)} ({budget.nbytes:,} bytes).\n"
        f"The smallest feasible budget{cache} is {format_bytes(floor.nbytes)} ({floor.nbytes:,} bytes), most of it "
        f"{largest}:\n{parts}\n{lines}",
        floor.nbytes,
        [{"change": suggestion.flags, "floor_bytes": suggestion.floor} for suggestion in fitting],
    )


def _tried(problem: Problem, budget: Budget) -> str:
    """Name what suggestions are looked for in: see :func:`_changes`."""
    settings = ["a shorter context"] if budget.scope != "file" else []
    if settings and problem.checkpoint.shape.generates:
        settings += ["a smaller KV cache or prompt batch"]
    return ", ".join((*settings, "the types that plans take by default or another format"))


def unaccepted_loss(plan: Plan) -> UnacceptedLossError:
    """Explain that a plan is far off, with what was planned to keep more."""
    better = plan.certificate.alternatives
    lines = "\n".join(f"  {each.change:<52}{each.predicted_perplexity or 0:>12,.2f}" for each in better)
    advice = (
        f"Predicted perplexity with other settings:\n{lines}"
        if better
        else "No shorter context or smaller cache keeps more; a larger  --budget  or other  --types  may"
    )
    return UnacceptedLossError(
        f"{plan.far_off}, more than {FAR_OFF:g} times.\n{advice}\nTo export it anyway:  --accept-loss",
        [{"change": each.change, "predicted_perplexity": each.predicted_perplexity} for each in better],
    )


def _round_up(nbytes: int) -> str:
    """Return a budget of at least ``nbytes``, short enough to type."""
    digits = 10 ** max(0, len(str(nbytes)) - 3)
    return size_name(-(-nbytes // digits) * digits)


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


def mended(
    problem: Problem, budget: Budget, rule: ServingRule, plan: Plan, *, settings: bool
) -> tuple[Alternative, ...]:
    """Return what brings a plan that is far off near the dense model: the smallest budget that does, and with
    ``settings`` the longest context that does at this one."""
    found = []
    if settings and budget.scope != "file" and problem.checkpoint.shape.generates:
        serving = plan.serving
        smaller = _smaller_cache(problem, serving.cache_type_k, serving.cache_type_v)
        keys, values = (smaller, smaller) if smaller else (serving.cache_type_k, serving.cache_type_v)
        for context in (plan.serving.context, *_shorter(plan.serving.context)):
            batch = min(_LEAST_BATCH, plan.serving.prompt_batch)
            leaner = replace(serving, context=context, cache_type_k=keys, cache_type_v=values, prompt_batch=batch)
            changed = problem.plan(budget, leaner, exact=False)
            if not changed.far_off:
                flags = f"--context {context} {_cache_flags(keys, values)} --prompt-batch {batch}"
                found.append(Alternative(flags, changed.predicted_loss, changed.predicted_perplexity))
                break
    larger = _near_budget(problem, budget, rule)
    if larger is not None:
        flags = f"--budget {_round_up(larger.budget_bytes)}"
        found.append(Alternative(flags, larger.predicted_loss, larger.predicted_perplexity))
    return tuple(found)


def _near_budget(problem: Problem, budget: Budget, rule: ServingRule) -> Plan | None:
    """Return the plan of the smallest budget, to a few per cent, that is not far off; ``None`` if all are."""
    low, high = budget.nbytes, problem.largest(budget.scope, rule.serving(budget, problem.memory)).used_bytes
    best: Plan | None = None
    while high > low * _BUDGET_STEP or best is None:
        larger = replace(budget, nbytes=high if best is None else (low + high) // 2)
        plan = problem.plan(larger, rule.serving(larger, problem.memory), exact=False)
        if not plan.far_off:
            best, high = plan, larger.nbytes
        elif best is None:
            return None
        else:
            low = larger.nbytes
    return best


def _leaner(problem: Problem, plan: Plan, noteworthy: float) -> Iterator[tuple[str, Serving]]:
    """Yield flags, and the serving that they ask for, that shrink a part of at least ``noteworthy`` bytes."""
    if not problem.checkpoint.shape.generates:
        return
    serving = plan.serving
    if plan.breakdown["kv_cache"] > noteworthy:
        cache = _smaller_cache(problem, serving.cache_type_k, serving.cache_type_v)
        if cache is not None:
            yield f"--cache-type {cache}", replace(serving, cache_type_k=cache, cache_type_v=cache)
        if serving.context > _LEAST_CONTEXT:
            half = serving.context // 2
            yield f"--context {half}", replace(serving, context=half, prompt_batch=min(half, serving.prompt_batch))
    if plan.breakdown["compute"] + plan.breakdown["output"] > noteworthy and serving.prompt_batch > _LEAST_BATCH:
        yield f"--prompt-batch {_LEAST_BATCH}", replace(serving, prompt_batch=_LEAST_BATCH)


def _least_cache(problem: Problem, budget: Budget, rule: ServingRule, floor: Floor) -> Suggestion | None:
    """Return the cache that makes the smallest feasible budget smallest, if another one does."""
    if budget.scope == "file" or not problem.checkpoint.shape.generates:
        return None
    found = []
    for cache in _smaller_caches(problem, rule.cache_type_k, rule.cache_type_v):
        serving = replace(rule, cache_type_k=cache, cache_type_v=cache).serving(budget, problem.memory)
        found.append(Suggestion(f"--cache-type {cache}", problem.floor(budget.scope, serving).nbytes))
    least = min(found, key=lambda each: each.floor, default=None)
    return least if least is not None and least.floor < floor.nbytes else None


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
    caches = _smaller_caches(problem, rule.cache_type_k, rule.cache_type_v)
    for cache in caches:
        smaller = replace(rule, cache_type_k=cache, cache_type_v=cache)
        yield _Change("cache", f"--cache-type {cache}", problem, smaller)
    small_batch, generates = replace(rule, prompt_batch=_LEAST_BATCH), problem.checkpoint.shape.generates
    if generates and rule.serving(budget, problem.memory).prompt_batch > _LEAST_BATCH:
        yield _Change("batch", f"--prompt-batch {_LEAST_BATCH}", problem, small_batch)
    for context in _shorter(rule.context):
        yield _Change("context", f"--context {context}", problem, replace(rule, context=context))
    for cache in caches if generates else ():
        for context in _shorter(rule.context):
            flags = f"--context {context} --cache-type {cache} --prompt-batch {_LEAST_BATCH}"
            leaner = replace(small_batch, context=context, cache_type_k=cache, cache_type_v=cache)
            yield _Change("all", flags, problem, leaner)


def _shorter(context: int) -> Iterator[int]:
    while context > _LEAST_CONTEXT:
        context //= 2
        yield context


def _smaller_cache(problem: Problem, keys: str, values: str) -> str | None:
    """Return the smallest type that loses next to nothing, if it is smaller than those of keys and values."""
    types = _smaller_caches(problem, keys, values)
    return types[0] if types and _cache_bytes(problem, types[0]) >= _HARMLESS_CACHE else None


def _smaller_caches(problem: Problem, keys: str, values: str) -> list[str]:
    """Return types that make a smaller cache: the smallest that loses next to nothing, and the smallest of all."""
    format, checkpoint = problem.space.format, problem.checkpoint
    present = _cache_bytes(problem, keys) + _cache_bytes(problem, values)
    sizes = {
        name: _cache_bytes(problem, name)
        for name in format.cache_types
        if not format.refused_cache(checkpoint, name, name)
    }
    smaller = {name: size for name, size in sizes.items() if 2 * size < present}
    harmless = {name: size for name, size in smaller.items() if size >= _HARMLESS_CACHE}
    return list(dict.fromkeys(min(each, key=lambda name: each[name]) for each in (harmless, smaller) if each))


def _cache_bytes(problem: Problem, cache_type: str) -> float:
    numerator, denominator = problem.space.format.cache_types[cache_type]
    return numerator / denominator


def _cache_flags(keys: str, values: str) -> str:
    return f"--cache-type {keys}" if keys == values else f"--cache-type-k {keys} --cache-type-v {values}"
