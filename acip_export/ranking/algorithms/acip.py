"""Learn the order: masks and adapters in one run of gradient descent, see :mod:`acip_export.ranking.acip_run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acip_export.ranking.algorithm import Algorithm, Ranking

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


def score(context: RankContext, factorized: Factorized) -> Ranking:
    """Score each component by when its mask reached zero, or by what its mask still is."""
    from acip_export.ranking.learned import learn

    return learn(context, factorized)


ALGORITHM = Algorithm(
    "acip",
    "The order in which learned masks reach zero, starting from that of fisher.",
    "kfac",
    score,
    source="ACIP, arXiv 2502.01717",
    learns=True,
    fisher=True,
)
