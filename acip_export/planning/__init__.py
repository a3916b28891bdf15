"""Shapes, scores and a budget in, plan out. Imports no torch."""

from acip_export.planning.planner import DEFAULT_CONTEXT, PlanRequest, PredictFiles, Problem, choose_context, make_plan
from acip_export.planning.presets import preset
from acip_export.planning.sweep import SweepLine, preset_points, sweep

__all__ = [
    "DEFAULT_CONTEXT",
    "PlanRequest",
    "PredictFiles",
    "Problem",
    "SweepLine",
    "choose_context",
    "make_plan",
    "preset",
    "preset_points",
    "sweep",
]
