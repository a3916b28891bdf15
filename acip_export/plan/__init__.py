"""Shapes, scores and a budget in, plan out. Imports no torch."""

from acip_export.plan.planner import PlanRequest, make_plan

__all__ = ["PlanRequest", "make_plan"]
