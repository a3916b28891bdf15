"""Rank the components of ``kfac`` by the Fisher information of their masks, measured on the model as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acip_export.ranking.algorithm import Algorithm, Ranking, as_scores

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


def score(context: RankContext, factorized: Factorized) -> Ranking:
    """Score each component by the loss that the Fisher information of its mask predicts for dropping it."""
    from acip_export.ranking.mask_gradients import component_fisher

    drop_losses = component_fisher(context, factorized)
    return Ranking(as_scores(drop_losses), drop_losses)


ALGORITHM = Algorithm(
    "fisher", "The loss that the Fisher information of each component's mask predicts.", "kfac", score, fisher=True
)
