"""Multiple-choice knapsack: one candidate per group, least total loss, total bytes within the capacity.

Pareto filter, then the linear relaxation over each group's convex hull (its value is the Lagrangian bound; Zemel 1984),
then an exact finish (:mod:`acip_export.planning.knapsack_exact`) over the candidates that the bound cannot rule out.
Deterministic: ties are broken by group and candidate number, and the search is limited by states, never by time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from acip_export.planning.knapsack_exact import search

# Losses are whole multiples of this, about 1e-12 nats: their sums are exact in float64, in any order, so that no two
# plans are ever told apart by rounding.
LOSS_QUANTUM = 2.0**-40


@dataclass(frozen=True)
class Choices:
    """The candidates of one group, in any order: ``nbytes`` (n,) int64 and ``loss`` (n,) float64."""

    nbytes: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """A choice: ``chosen[g]`` is a candidate number of group ``g``.

    No choice within the capacity has a loss below ``lower_bound``; ``proven``: none has a loss below ``loss``.
    """

    chosen: tuple[int, ...]
    nbytes: int
    loss: float
    lower_bound: float
    proven: bool = False


def pareto(choices: Choices) -> npt.NDArray[np.int64]:
    """Return the numbers of the candidates that no other one beats, by growing bytes and strictly falling loss."""
    order = np.lexsort((choices.loss, choices.nbytes))  # stable: equal ones stay in order
    loss = choices.loss[order]
    return order[np.r_[True, loss[1:] < np.minimum.accumulate(loss)[:-1]]]


def _front(choices: Choices, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return numbers[pareto(Choices(choices.nbytes[numbers], choices.loss[numbers]))]


def allocate(groups: Sequence[Choices], capacity: int, exact: bool = True) -> Allocation | None:
    """Solve for a single capacity, see :meth:`Knapsack.solve`."""
    return Knapsack(groups).solve(capacity, exact)


class Knapsack:
    """One set of choices, solved for many capacities.

    Args:
        allowed: (n,) for each group, whether a candidate may be chosen; default: all. One of each group, at least.

    Attributes:
        smallest, largest: bytes of the smallest choice, and of the smallest one of least loss.
    """

    def __init__(self, groups: Sequence[Choices], allowed: Sequence[npt.NDArray[np.bool_]] | None = None) -> None:
        if allowed is None:
            fronts = [pareto(group) for group in groups]
        else:
            fronts = [_front(group, np.flatnonzero(mask)) for group, mask in zip(groups, allowed, strict=True)]
        sizes = [len(front) for front in fronts]
        # The fronts one after the other; a position counts through all of them.
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._owner = np.repeat(np.arange(len(groups)), sizes)
        self._candidate = np.concatenate(fronts)
        self._nbytes = np.concatenate([group.nbytes[front] for group, front in zip(groups, fronts, strict=True)])
        self._loss = np.concatenate([group.loss[front] for group, front in zip(groups, fronts, strict=True)])
        self.smallest = int(self._nbytes[self._starts].sum())
        self.largest = int(self._nbytes[self._starts + np.array(sizes) - 1].sum())
        to, extra, gain = self._steps()
        self._step_to = to
        self._step_extra = np.cumsum(extra)
        self._slope = gain / extra

    def solve(self, capacity: int, exact: bool = True) -> Allocation | None:
        """Return the best choice within ``capacity`` bytes, or ``None`` when even the smallest candidates do not fit.

        Without ``exact`` it is the relaxation's integral part, filled up: within one candidate of the best.
        """
        if self.smallest > capacity:
            return None
        chosen, price, bound = self._relax(capacity)
        if price == 0.0:
            return self._allocation(chosen, bound, proven=True)
        chosen, proven = self._fill(chosen, capacity), False
        if exact:
            best, proven = search(self._starts, self._nbytes, self._loss, capacity, price, chosen)
            if self._loss[best].sum() <= self._loss[chosen].sum():
                chosen = best
        return self._allocation(chosen, bound, proven)

    def lower_bound(self, capacity: int) -> float:
        """Return a bound below the loss of every choice within ``capacity``; infinite if there is none."""
        return self._relax(capacity)[2] if self.smallest <= capacity else float("inf")

    def price(self, capacity: int) -> float:
        """Return what a byte is worth at ``capacity``: loss per byte of the relaxation's next upgrade."""
        return self._relax(max(capacity, self.smallest))[1]

    def _allocation(self, chosen: npt.NDArray[np.int64], bound: float, proven: bool) -> Allocation:
        loss = float(self._loss[chosen].sum())
        picks = tuple(int(candidate) for candidate in self._candidate[chosen])
        return Allocation(picks, int(self._nbytes[chosen].sum()), loss, min(bound, loss), proven)

    def _steps(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return all steps between neighbours on the hulls, the best first: position that it leads to, bytes, gain."""
        steps: list[tuple[float, int, int, float]] = []
        nbytes, loss = self._nbytes.tolist(), self._loss.tolist()
        for start, stop in pairwise([*self._starts.tolist(), len(nbytes)]):
            for a, b in pairwise(_hull(nbytes, loss, start, stop)):
                extra, gain = nbytes[b] - nbytes[a], loss[a] - loss[b]
                steps.append((-gain / extra, b, extra, gain))
        steps.sort()
        return (
            np.array([step[1] for step in steps], np.int64),
            np.array([step[2] for step in steps], np.int64),
            np.array([step[3] for step in steps], np.float64),
        )

    def _relax(self, capacity: int) -> tuple[npt.NDArray[np.int64], float, float]:
        """Return integral part, price (loss per byte) and value of the linear relaxation."""
        left = capacity - self.smallest
        taken = int(np.searchsorted(self._step_extra, left, side="right"))
        chosen = self._starts.copy()
        # A group's steps come in the order of its hull, so the last one taken is the farthest.
        np.maximum.at(chosen, self._owner[self._step_to[:taken]], self._step_to[:taken])
        loss = float(self._loss[chosen].sum())
        if taken == len(self._step_to):
            return chosen, 0.0, loss
        left -= int(self._step_extra[taken - 1]) if taken else 0
        price = float(self._slope[taken])
        return chosen, price, loss - price * left

    def _fill(self, start: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
        """Spend what is left on single upgrades, the one with the greatest gain first."""
        chosen = start.copy()
        while True:
            left = capacity - int(self._nbytes[chosen].sum())
            gain = self._loss[chosen][self._owner] - self._loss
            gain[self._nbytes > self._nbytes[chosen][self._owner] + left] = 0.0
            best = int(np.argmax(gain))
            if gain[best] <= 0:
                return chosen
            chosen[self._owner[best]] = best


def _hull(nbytes: list[int], loss: list[float], start: int, stop: int) -> list[int]:
    """Return the positions of the lower convex hull of the Pareto front from ``start`` to ``stop``."""
    hull: list[int] = []
    for i in range(start, stop):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (nbytes[i] - nbytes[a]) > (loss[a] - loss[i]) * (nbytes[b] - nbytes[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
