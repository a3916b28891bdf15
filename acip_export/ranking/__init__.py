"""Ranking: a model and text in, a score file out. Start at :func:`acip_export.ranking.stage.rank_model`.

The names below are imported when they are first used: the command line reads :mod:`.algorithms` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acip_export.ranking.acip_defaults import automatic_config as automatic_config
    from acip_export.ranking.acip_defaults import default_algorithm as default_algorithm
    from acip_export.ranking.config import AcipConfig as AcipConfig
    from acip_export.ranking.config import DataConfig as DataConfig
    from acip_export.ranking.config import parse_settings as parse_settings
    from acip_export.ranking.stage import rank_model as rank_model

_HOME = {
    "AcipConfig": "config",
    "DataConfig": "config",
    "automatic_config": "acip_defaults",
    "default_algorithm": "acip_defaults",
    "parse_settings": "config",
    "rank_model": "stage",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
