"""Rank a transformer once, export it at any size.

The names below are the Python API; each is imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acip_export.version import __version__

if TYPE_CHECKING:
    from acip_export.api import convert_bundle, export_model, materialize_bundle, plan_export
    from acip_export.artifacts.bundle import Bundle, load_bundle
    from acip_export.artifacts.plan import Plan, load_plan, save_plan
    from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
    from acip_export.model.checkpoint import Checkpoint
    from acip_export.planning import PlanRequest, make_plan
    from acip_export.ranking import rank_model
    from acip_export.verification.export import verify_export

_HOME = {
    "Bundle": "acip_export.artifacts.bundle",
    "Checkpoint": "acip_export.model.checkpoint",
    "Plan": "acip_export.artifacts.plan",
    "PlanRequest": "acip_export.planning",
    "ScoreFile": "acip_export.artifacts.scores",
    "convert_bundle": "acip_export.api",
    "export_model": "acip_export.api",
    "load_bundle": "acip_export.artifacts.bundle",
    "load_plan": "acip_export.artifacts.plan",
    "load_scores": "acip_export.artifacts.scores",
    "make_plan": "acip_export.planning",
    "materialize_bundle": "acip_export.api",
    "plan_export": "acip_export.api",
    "rank_model": "acip_export.ranking",
    "save_plan": "acip_export.artifacts.plan",
    "save_scores": "acip_export.artifacts.scores",
    "verify_export": "acip_export.verification.export",
}

__all__ = [  # noqa: RUF022  (the API first, in the order of the stages)
    "rank_model",
    "make_plan",
    "plan_export",
    "materialize_bundle",
    "convert_bundle",
    "export_model",
    "verify_export",
    "load_scores",
    "save_scores",
    "load_plan",
    "save_plan",
    "load_bundle",
    "Bundle",
    "Checkpoint",
    "Plan",
    "PlanRequest",
    "ScoreFile",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'acip_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
