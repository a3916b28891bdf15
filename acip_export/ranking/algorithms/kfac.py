"""Rank by half the squared singular value of G^(1/2) W H^(1/2): the predicted loss, comparable across layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acip_export.ranking.algorithm import Algorithm, Ranking, as_scores

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


def score(context: RankContext, factorized: Factorized) -> Ranking:  # noqa: ARG001
    """Score each component by the loss that the moments predict for dropping it."""
    return Ranking(as_scores(factorized.drop_losses), factorized.drop_losses)


ALGORITHM = Algorithm(
    "kfac",
    "The loss that a Kronecker-factored Fisher matrix predicts for dropping a component.",
    "kfac",
    score,
    source="K-FAC, arXiv 1503.05671",
)
