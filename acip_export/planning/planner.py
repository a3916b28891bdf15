"""The planner: a pure function of a problem, a budget and a serving rule to the best plan within the budget."""

from __future__ import annotations

from dataclasses import replace

from acip_export.artifacts.plan import Plan
from acip_export.planning.advice import alternatives
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.certificate import refused_types
from acip_export.planning.problem import Problem


def make_plan(problem: Problem, budget: Budget, rule: ServingRule) -> Plan:
    """Return the plan of least predicted loss whose exact bytes are within the budget, and why it is not better.

    Raises:
        DoesNotFit: no plan fits; :func:`acip_export.planning.advice.infeasible` explains it to the user.
        UnsupportedError: the format's converter cannot express a decision.
    """
    plan = problem.plan(budget, rule.serving(budget, problem.memory))
    certificate = replace(
        plan.certificate,
        alternatives=alternatives(problem, budget, plan),
        refused_types=refused_types(problem.space, problem.candidates),
    )
    return replace(plan, certificate=certificate)
