"""Rank a transformer once, export it at any size.

The names below are the Python API; each is imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acip_export.version import __version__

if TYPE_CHECKING:
    from acip_export.bundle import Bundle, load_bundle
    from acip_export.checkpoint import Checkpoint
    from acip_export.pipeline import convert_bundle, export_model, materialize_bundle, plan_export
    from acip_export.plan import PlanRequest, make_plan
    from acip_export.plans import Plan, load_plan, save_plan
    from acip_export.rank import rank_model
    from acip_export.scores import ScoreFile, load_scores, save_scores
    from acip_export.verify.verify import verify_export

_HOME = {
    "Bundle": "acip_export.bundle",
    "Checkpoint": "acip_export.checkpoint",
    "Plan": "acip_export.plans",
    "PlanRequest": "acip_export.plan",
    "ScoreFile": "acip_export.scores",
    "convert_bundle": "acip_export.pipeline",
    "export_model": "acip_export.pipeline",
    "load_bundle": "acip_export.bundle",
    "load_plan": "acip_export.plans",
    "load_scores": "acip_export.scores",
    "make_plan": "acip_export.plan",
    "materialize_bundle": "acip_export.pipeline",
    "plan_export": "acip_export.pipeline",
    "rank_model": "acip_export.rank",
    "save_plan": "acip_export.plans",
    "save_scores": "acip_export.scores",
    "verify_export": "acip_export.verify.verify",
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
