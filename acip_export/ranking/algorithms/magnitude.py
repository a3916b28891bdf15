"""Rank by the singular values of the plain SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acip_export.ranking.algorithm import Algorithm, Ranking, as_scores

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


def score(context: RankContext, factorized: Factorized) -> Ranking:  # noqa: ARG001
    """Score each component by its singular value."""
    return Ranking(as_scores(factorized.singular), factorized.drop_losses)


ALGORITHM = Algorithm("magnitude", "The singular values of the weights themselves.", "svd", score)
