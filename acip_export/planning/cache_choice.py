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
    for keys, values in _undominated(problem, rule, pairs):
        try:
            changed = settled(problem, budget, replace(rule, cache_type_k=keys, cache_type_v=values))
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


def _undominated(problem: Problem, rule: ServingRule, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    costs = []
    for keys, values in pairs:
        serving = replace(rule, cache_type_k=keys, cache_type_v=values).at_every_budget(1)
        loss = problem.cache_losses.loss(serving)
        if loss is not None:
            costs.append((problem.memory.serving(serving).total, loss, (keys, values)))
    found: list[tuple[str, str]] = []
    least = float("inf")
    for _, loss, pair in sorted(costs):
        if loss < least:
            found.append(pair)
            least = loss
    return found
