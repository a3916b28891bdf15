"""Ranking: a model and text in, a score file out. Start at :func:`rank_model`."""

from acip_export.ranking.acip_defaults import automatic_config
from acip_export.ranking.config import AcipConfig, Algorithm, DataConfig, Progress, ProgressCallback, parse_settings
from acip_export.ranking.stage import rank_model

__all__ = [
    "AcipConfig",
    "Algorithm",
    "DataConfig",
    "Progress",
    "ProgressCallback",
    "automatic_config",
    "parse_settings",
    "rank_model",
]
