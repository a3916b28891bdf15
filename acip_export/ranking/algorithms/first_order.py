"""Rank by first-order loss estimates, in the order that keeps their sum near zero (Zero Sum SVD, arXiv 2602.02848).

In the input-whitened basis, dropping a component of singular value s changes the calibration loss by about -s dL/ds,
which is -dL/dm for its mask m at one. The estimates have both signs. Components are dropped one after the other, within
a module from the smallest singular value up: of the modules' next candidates, the one with the smallest absolute
estimate among those whose sign brings the sum of all estimates so far back towards zero.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from acip_export.ranking.algorithm import Algorithm, Ranking

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


def score(context: RankContext, factorized: Factorized) -> Ranking:
    """Score each component by its place in the order of dropping."""
    from acip_export.ranking.mask_gradients import first_order_changes

    changes = first_order_changes(context, factorized.layers)
    return Ranking(zero_sum_scores(changes, factorized.singular), factorized.drop_losses)


def zero_sum_scores(
    changes: Mapping[str, npt.NDArray[np.float64]], singular: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the place of each component in the order of dropping, from 1 for the first, by module.

    Args:
        changes: first-order estimates. singular: singular values; equal ones are dropped from the last component up.
    """
    queues = {
        name: (len(values) - 1 - np.argsort(values[::-1], kind="stable")).tolist() for name, values in singular.items()
    }
    scores = {name: np.zeros(len(values), np.float32) for name, values in singular.items()}
    names = list(singular)
    heaps: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    places = [0] * len(names)

    def offer(module: int) -> None:
        queue = queues[names[module]]
        if places[module] < len(queue):
            change = float(changes[names[module]][queue[places[module]]])
            heapq.heappush(heaps[change > 0], (abs(change), module))

    for module in range(len(names)):
        offer(module)
    total, position = 0.0, 0
    while heaps[True] or heaps[False]:
        wanted = total <= 0
        sign = wanted if heaps[wanted] else not wanted
        size, module = heapq.heappop(heaps[sign])
        total += size if sign else -size
        position += 1
        scores[names[module]][queues[names[module]][places[module]]] = position
        places[module] += 1
        offer(module)
    return scores


ALGORITHM = Algorithm(
    "first-order",
    "First-order changes of the loss, dropped in an order that keeps their sum near zero.",
    "input",
    score,
    source="Zero Sum SVD, arXiv 2602.02848",
)
