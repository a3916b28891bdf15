"""The planner: a pure function of a problem, a budget and a serving rule to the best plan within the budget."""

from __future__ import annotations

from dataclasses import replace

from acip_export.artifacts.plan import Plan, types_used
from acip_export.planning.advice import alternatives, mended
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.certificate import refused_types
from acip_export.planning.context import doublings, settled
from acip_export.planning.problem import DoesNotFit, Problem
from acip_export.planning.speed import Pace, at_pace

# Of predicted losses: what is nearer than this is not worth a newer runtime.
_AS_GOOD = 1.02


def make_plan(problem: Problem, budget: Budget, rule: ServingRule, pace: Pace | None = None) -> Plan:
    """Return the plan of least predicted loss whose exact bytes are within the budget, and why it is not better.

    Args:
        pace: to predict its speed with, and how fast it must be; ``None``: its speed is not predicted.

    Raises:
        UnreachableSpeedError: no plan is as fast as it must be.
        UnacceptedLossError: no context has a plan that loses as little as was asked for.
        DoesNotFit: no plan fits; :func:`acip_export.planning.advice.infeasible` explains it to the user.
        UnsupportedError: the format cannot express a decision.
    """
    rule = settled(problem, budget, rule)
    best, of_types = in_older_types(problem, budget, problem.plan(budget, rule.serving(budget, problem.memory)))
    plan = at_pace(problem, budget, best, pace)
    better = alternatives(problem, budget, plan)
    if plan.far_off is not None:
        better += mended(problem, budget, rule, plan, settings=all(each.far_off for each in better))
    certificate = replace(
        plan.certificate,
        alternatives=better,
        refused_types=refused_types(problem.space, problem.candidates),
        contexts=doublings(problem, budget, rule, plan),
    )
    notes = (
        *plan.notes,
        *(of_types if plan.runtime_release else ()),
        *gaussian_note(problem, plan),
        *cache_note(problem, plan),
        *problem.space.format.serving_notes(plan.serving),
    )
    return replace(plan, certificate=certificate, notes=notes)


def in_older_types(problem: Problem, budget: Budget, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Replace a plan with newer types, unasked, by one that every release of the runtime reads, where that is as good.

    Returns:
        The plan to go on with, and what a user has to know if it is still the same.
    """
    space = problem.space
    # Who names types, or a release, wants them; then there is nothing to say of them either.
    said = space.format.type_notes(types_used(plan.tensors), space.options)
    if plan.runtime_release is None or space.types != space.default_types or not said:
        return plan, ()
    old = {type_.name for type_ in space.format.weight_types if not type_.since}
    try:
        other = problem.only(lambda _, option: old.issuperset(option.types)).plan(budget, plan.serving)
    except DoesNotFit:
        return plan, (f"no plan fits in types that older releases than {plan.runtime_release} read",)
    if other.predicted_loss <= _AS_GOOD * plan.predicted_loss:
        # No plan of any types is better than the one that is not taken.
        certificate = replace(other.certificate, lower_bound=plan.certificate.lower_bound)
        return replace(other, certificate=certificate), ()
    return plan, (
        f"in types that older releases than {plan.runtime_release} read, the predicted loss is "
        f"{other.predicted_loss:.4f} {plan.loss_unit}, not {plan.predicted_loss:.4f}",
    )


def cache_note(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Say so when the prediction leaves out what the KV cache's types cost."""
    serving = plan.serving
    own = next(iter(problem.space.format.cache_types))
    if plan.task != "causal" or problem.cache_losses.loss(serving) is not None or serving.cache_types in (own, "f32"):
        return ()
    return (
        f"the predicted loss leaves out what a KV cache of {serving.cache_types} costs; --cache-type auto  measures it",
    )


def gaussian_note(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Say so when the plan's rounding errors are those of Gaussian weights, where the model's own can be measured."""
    scores, format = problem.scores, problem.space.format
    rounded = [
        decision
        for decision in plan.tensors
        if (decision.module in scores.modules or decision.name in scores.embedding_sensitivity)
        and any(not format.type(name).is_float for name in decision.types)
    ]
    gaussian = sum(not problem.errors.measured(decision) for decision in rounded)
    if not gaussian:
        return ()
    return (
        f"rounding errors of {gaussian} of {len(rounded)} quantized matrices are those of Gaussian weights; with the "
        f"quantizer of {plan.format} installed they are measured on this model",
    )
