"""The context as an answer: the longest that fits a budget at a quality, and what every doubling costs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import groupby

from acip_export.artifacts.plan import ContextCost, Plan
from acip_export.errors import UnacceptedLossError
from acip_export.planning.budget import CONTEXT_STEP, Budget, ServingRule
from acip_export.planning.problem import DoesNotFit, Problem

# What the longest context may cost beyond the shortest one, where nobody says, in nats: a per cent of perplexity.
_LONGER_COSTS = 0.01
_LEAST_DOUBLED = 512


def settled(problem: Problem, budget: Budget, rule: ServingRule) -> ServingRule:
    """Return ``rule`` with a context: the longest with a plan that loses no more than it may.

    Contexts are multiples of :data:`~acip_export.planning.budget.CONTEXT_STEP`, and the model's longest.

    Raises:
        DoesNotFit: not even the shortest has a plan.
        UnacceptedLossError: none loses as little as was asked for.
    """
    if not rule.longest:
        return rule
    shortest = problem.plan(budget, rule.least.serving(budget, problem.memory))
    most = shortest.predicted_loss + _LONGER_COSTS if rule.most_loss is None else rule.most_loss
    if shortest.predicted_loss > most:
        raise UnacceptedLossError(
            f"no context has a plan with a predicted loss of {most:g} or less: with  --context {rule.least.context}  "
            f"it is {shortest.predicted_loss:.4f} {shortest.loss_unit}.\n"
            f"Allow more with  --max-loss {shortest.predicted_loss * 1.05:.2g},  or give a larger  --budget"
        )

    def too_long(context: int) -> bool:
        try:
            plan = problem.plan(budget, replace(rule, context=context).serving(budget, problem.memory))
        except DoesNotFit:
            return True
        return plan.predicted_loss > most

    contexts = [*range(CONTEXT_STEP, rule.context, CONTEXT_STEP), rule.context]

    def batch(context: int) -> int:
        return replace(rule, context=context).serving(budget, problem.memory).prompt_batch

    # Prompts in smaller batches make room, so that a longer context may lose less: among those of one batch it never
    # does.
    groups = [list(group) for _, group in groupby(contexts, batch)]
    for group in reversed(groups):
        count = bisect_left(group, True, key=too_long)
        if count:
            return replace(rule, context=group[count - 1], longest=False)
    return rule.least


def doublings(problem: Problem, budget: Budget, rule: ServingRule, plan: Plan) -> tuple[ContextCost, ...]:
    """Plan for every context that is a power of two, up to the model's, at the same budget."""
    if budget.scope == "file" or not problem.checkpoint.shape.generates:
        return ()
    longest = problem.space.format.longest_context(problem.checkpoint.shape)
    costs = []
    context = min(_LEAST_DOUBLED, longest)
    while context <= longest:
        serving = replace(rule, context=context).serving(budget, problem.memory)
        nbytes = problem.memory.serving(serving).kv_cache
        try:
            # The plan itself is known, and exact.
            found = plan if serving == plan.serving else problem.plan(budget, serving, exact=False)
        except DoesNotFit:
            costs.append(ContextCost(context, nbytes))
        else:
            costs.append(ContextCost(context, nbytes, found.predicted_loss, found.predicted_perplexity))
        context *= 2
    return tuple(costs)
