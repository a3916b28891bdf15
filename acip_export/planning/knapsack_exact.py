"""The exact finish of a multiple-choice knapsack: dynamic programming over undominated states.

A state is a choice for some of the groups: its bytes, its loss, and how much worse it is than the relaxation at the
relaxation's price (its excess, which never shrinks). States whose excess, with what must be left unspent, reaches the
best choice known are dropped, and of states with equal or more bytes and no less loss the worse (Pisinger 1995 has
both for this problem). What is left is small: thousands of states for the 290 tensors of a 7B model. HiGHS, which did
this before, took a second in its root node alone, and 13 with candidates of 2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# States kept after each group: a first pass that usually proves its result, and otherwise finds a better choice to
# prune by; then one with room for what is left. Beyond it the result is not proven, and the bound tells by how much.
_FEW, _MANY = 3_000, 60_000

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def search(
    starts: IntArray, nbytes: IntArray, loss: FloatArray, capacity: int, price: float, known: IntArray
) -> tuple[IntArray, bool]:
    """Return the choice of least loss, and of least bytes among these, and whether that is proven.

    Args:
        starts: (groups,) where each group begins in ``nbytes`` and ``loss``, which hold each group's Pareto front.
        price: what the relaxation says a byte is worth; any that is not negative is right, its own prunes most.
        known: (groups,) positions of a choice within ``capacity``.
    """
    found, proven = known, False
    for limit in (_FEW, _MANY):
        found, proven = _Search(starts, nbytes, loss, capacity, price, found).run(limit)
        if proven:
            break
    return found, proven


@dataclass(frozen=True)
class _Group:
    """What pruning leaves of a group: positions, bytes and loss above the smallest one's, excess."""

    kept: IntArray
    extra: IntArray
    loss: FloatArray
    excess: FloatArray


class _Search:
    def __init__(
        self, starts: IntArray, nbytes: IntArray, loss: FloatArray, capacity: int, price: float, known: IntArray
    ) -> None:
        cost = loss + price * nbytes
        least = np.minimum.reduceat(cost, starts)
        # Sums of prices in another order differ by this much.
        slack = 1e-12 * (float(np.abs(least).sum()) + price * capacity)
        self._gap = float(loss[known].sum() - (least.sum() - price * capacity)) + slack
        self._price, self._known = price, known
        stops = np.r_[starts[1:], len(cost)]
        groups: list[_Group] = []
        for start, stop, lowest in zip(starts.tolist(), stops.tolist(), least.tolist(), strict=True):
            kept = start + np.flatnonzero(cost[start:stop] - lowest <= self._gap)
            first = kept[0]
            groups.append(_Group(kept, nbytes[kept] - nbytes[first], loss[kept] - loss[first], cost[kept] - lowest))
        self._groups = groups
        self._room = capacity - int(sum(nbytes[group.kept[0]] for group in groups))
        # Far-reaching choices first: afterwards little can change, and most states are beyond what can be made up for.
        self._order = sorted(
            (g for g, group in enumerate(groups) if len(group.kept) > 1), key=lambda g: (-int(groups[g].extra[-1]), g)
        )

    def run(self, limit: int) -> tuple[IntArray, bool]:
        reach = [int(self._groups[g].extra[-1]) for g in self._order]
        rest = np.r_[np.cumsum(reach[::-1])[::-1], 0].tolist() if reach else [0]
        nbytes, loss = np.zeros(1, np.int64), np.zeros(1)
        excess = np.full(1, float(sum(g.excess[0] for g in self._groups if len(g.kept) == 1)))
        parents: list[IntArray] = []
        proven = True
        for step, g in enumerate(self._order):
            group, width = self._groups[g], len(self._groups[g].kept)
            nbytes = (nbytes[:, None] + group.extra).ravel()
            excess = (excess[:, None] + group.excess).ravel()
            left = self._room - nbytes
            # What nobody can spend any more is lost at the relaxation's price.
            worst = excess + self._price * np.maximum(left - rest[step + 1], 0)
            alive = np.flatnonzero((left >= 0) & (worst <= self._gap))
            if len(alive) == 0:
                return self._known, proven
            loss = loss[alive // width] + group.loss[alive % width]
            nbytes, excess, worst = nbytes[alive], excess[alive], worst[alive]
            order = np.lexsort((loss, nbytes))
            sorted_loss = loss[order]
            order = order[np.r_[True, sorted_loss[1:] < np.minimum.accumulate(sorted_loss)[:-1]]]
            if len(order) > limit:
                order = order[np.sort(np.argsort(worst[order], kind="stable")[:limit])]
                proven = False
            nbytes, loss, excess = nbytes[order], loss[order], excess[order]
            parents.append(alive[order])
        return self._walk_back(int(np.argmin(loss)), parents), proven

    def _walk_back(self, state: int, parents: list[IntArray]) -> IntArray:
        chosen = np.array([group.kept[0] for group in self._groups])
        for g, parent in zip(reversed(self._order), reversed(parents), strict=True):
            before, choice = divmod(int(parent[state]), len(self._groups[g].kept))
            chosen[g], state = self._groups[g].kept[choice], before
        return chosen
