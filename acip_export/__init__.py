"""Rank a transformer once, export it at any size.

    >>> import acip_export
    >>> scores = acip_export.rank("model", "text.txt")
    >>> plan = acip_export.plan("model", scores, budget="900MB", format="onnx")
    >>> report = acip_export.export(plan, "export", model="model", scores=scores)

Each name below is imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acip_export.version import __version__

if TYPE_CHECKING:
    from acip_export.api.verbs import export, plan, rank, verify
    from acip_export.artifacts.bundle import Bundle, load_bundle
    from acip_export.artifacts.plan import Plan, load_plan, save_plan
    from acip_export.artifacts.report import Report, load_report
    from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
    from acip_export.errors import (
        AcipError,
        InfeasibleBudgetError,
        InputError,
        MissingExtraError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from acip_export.formats.protocol import ExportFormat
    from acip_export.formats.registry import export_formats
    from acip_export.model.checkpoint import Checkpoint

_MODULES = {
    "acip_export.api.verbs": ("rank", "plan", "export", "verify"),
    "acip_export.artifacts.scores": ("ScoreFile", "load_scores", "save_scores"),
    "acip_export.artifacts.plan": ("Plan", "load_plan", "save_plan"),
    "acip_export.artifacts.bundle": ("Bundle", "load_bundle"),
    "acip_export.artifacts.report": ("Report", "load_report"),
    "acip_export.model.checkpoint": ("Checkpoint",),
    "acip_export.formats.registry": ("export_formats",),
    "acip_export.formats.protocol": ("ExportFormat",),
    "acip_export.errors": (
        "AcipError",
        "UsageError",
        "InputError",
        "InfeasibleBudgetError",
        "UnsupportedError",
        "VerificationError",
        "MissingExtraError",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022  (the verbs first, then what they give and take, then errors)
    "rank",
    "plan",
    "export",
    "verify",
    "load_scores",
    "load_plan",
    "load_bundle",
    "load_report",
    "save_scores",
    "save_plan",
    "ScoreFile",
    "Plan",
    "Bundle",
    "Report",
    "Checkpoint",
    "ExportFormat",
    "export_formats",
    "AcipError",
    "UsageError",
    "InputError",
    "InfeasibleBudgetError",
    "UnsupportedError",
    "VerificationError",
    "MissingExtraError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'acip_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
