"""Shapes, scores and a budget in, plan out. Imports no torch."""

from acip_export.plan.planner import DEFAULT_CONTEXT, PlanRequest, make_plan

__all__ = ["DEFAULT_CONTEXT", "PlanRequest", "make_plan"]
