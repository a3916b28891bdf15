"""The choice of the KV cache's types: the pair whose plan loses least, cache and weights together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.context import settled
from acip_export.planning.problem import DoesNotFit, Problem


def with_best_cache(
    problem: Problem, budget: Budget, rule: ServingRule, pairs: Sequence[tuple[str, str]]
) -> ServingRule:
    """Return ``rule`` with those of ``pairs`` whose plan is best: the longest context, then the least predicted loss.

    Pairs that were not measured are left out; so are those that take more than another one and lose no less.

    Raises:
        DoesNotFit: no pair has a plan.
    """
    if len(pairs) == 1:
        return rule
    best: tuple[tuple[int, float], ServingRule] | None = None
    refused: DoesNotFit | None = None
    for with_cache in undominated_caches(problem, rule, pairs):
        try:
            changed = settled(problem, budget, with_cache)
            plan = problem.plan(budget, changed.serving(budget, problem.memory), exact=False)
        except DoesNotFit as reason:
            if refused is None or reason.floor.nbytes < refused.floor.nbytes:
                refused = reason
            continue
        rank = (-plan.serving.context, plan.predicted_loss)
        if best is None or rank < best[0]:
            best = rank, changed
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def undominated_caches(
    problem: Problem, rule: ServingRule, pairs: Sequence[tuple[str, str]]
) -> tuple[ServingRule, ...]:
    """Return ``rule`` with each of ``pairs`` that was measured and loses less than all that take as little."""
    if len(pairs) == 1:
        return (rule,)
    costs = []
    for number, (keys, values) in enumerate(pairs):
        changed = replace(rule, cache_type_k=keys, cache_type_v=values)
        serving = changed.at_every_budget(1)
        loss = problem.cache_losses.loss(serving)
        if loss is not None:
            costs.append((problem.memory.serving(serving).total, loss, number, changed))
    found: list[ServingRule] = []
    least = float("inf")
    for _, loss, _, changed in sorted(costs, key=lambda each: each[:3]):
        if loss < least:
            found.append(changed)
            least = loss
    return tuple(found)
