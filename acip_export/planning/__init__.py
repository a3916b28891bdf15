"""Shapes, scores and a budget in, plan out. Reads and writes no files, says nothing to the user, imports no torch.

:func:`resolve` turns what a user asks for into a search space, a rule for the serving settings and a budget;
:class:`Problem` is everything that one search space has to offer for one model, and plans for any budget.
"""

from acip_export.planning.advice import Suggestion, infeasible, unaccepted_loss
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.cache_choice import undominated_caches, with_best_cache
from acip_export.planning.planner import make_plan
from acip_export.planning.presets import preset
from acip_export.planning.problem import DoesNotFit, Floor, Problem
from acip_export.planning.request import DEFAULT_CONTEXT, PlanRequest, Question, resolve
from acip_export.planning.space import SearchSpace
from acip_export.planning.speed import check_pace
from acip_export.planning.sweep import SweepLine, preset_points, sweep
from acip_export.planning.variations import variations

__all__ = [
    "DEFAULT_CONTEXT",
    "Budget",
    "DoesNotFit",
    "Floor",
    "PlanRequest",
    "Problem",
    "Question",
    "SearchSpace",
    "ServingRule",
    "Suggestion",
    "SweepLine",
    "check_pace",
    "infeasible",
    "make_plan",
    "preset",
    "preset_points",
    "resolve",
    "sweep",
    "unaccepted_loss",
    "undominated_caches",
    "variations",
    "with_best_cache",
]
