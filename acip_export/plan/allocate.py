"""Multiple-choice knapsack: one candidate per group, least total loss, total bytes within the capacity.

Pareto filter, then the linear relaxation over each group's convex hull (its value is the Lagrangian bound; Zemel 1984),
then an exact finish with HiGHS over the candidates that the bound cannot rule out. Deterministic: ties are broken by
group and candidate number, and the search is limited by nodes, never by time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np
import numpy.typing as npt

# HiGHS closes these problems within a few nodes; the limit only guards against a pathological instance.
_NODE_LIMIT = 5000


@dataclass(frozen=True)
class Choices:
    """The candidates of one group: ``nbytes`` (n,) int64 and ``loss`` (n,) float64, in any order."""

    nbytes: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """``chosen[g]`` is a candidate number of group ``g``. No choice within the capacity has a loss below
    ``lower_bound``."""

    chosen: tuple[int, ...]
    nbytes: int
    loss: float
    lower_bound: float


def pareto(choices: Choices) -> npt.NDArray[np.int64]:
    """Numbers of the candidates that no other one beats, by growing bytes and strictly falling loss."""
    order = np.lexsort((np.arange(len(choices.loss)), choices.loss, choices.nbytes))
    best = np.minimum.accumulate(choices.loss[order])
    falls = np.r_[True, choices.loss[order][1:] < best[:-1]]
    return order[falls]


def allocate(groups: Sequence[Choices], capacity: int, exact: bool = True) -> Allocation | None:
    """The best choice within ``capacity`` bytes, or ``None`` when even the smallest candidates do not fit.

    Without ``exact`` it is the relaxation's integral part, filled up: within one candidate of the best, in no time.
    """
    fronts = [pareto(group) for group in groups]
    smallest = sum(int(group.nbytes[front[0]]) for group, front in zip(groups, fronts, strict=True))
    if smallest > capacity:
        return None
    start, price, bound = _relax(groups, fronts, capacity)
    chosen = _fill(groups, fronts, start, capacity)
    gap = _loss(groups, chosen) - bound
    if exact and gap > 1e-12 * max(1.0, abs(bound)):
        best = _finish(groups, fronts, capacity, price, bound, gap)
        if best is not None and _loss(groups, best) < _loss(groups, chosen):
            chosen = _fill(groups, fronts, best, capacity)
    return Allocation(tuple(chosen), _bytes(groups, chosen), _loss(groups, chosen), bound)


def _bytes(groups: Sequence[Choices], chosen: Sequence[int]) -> int:
    return sum(int(group.nbytes[c]) for group, c in zip(groups, chosen, strict=True))


def _loss(groups: Sequence[Choices], chosen: Sequence[int]) -> float:
    return float(sum(group.loss[c] for group, c in zip(groups, chosen, strict=True)))


def _hull(nbytes: npt.NDArray[np.int64], loss: npt.NDArray[np.float64]) -> list[int]:
    """Positions of the lower convex hull of a Pareto front."""
    hull: list[int] = []
    for i in range(len(nbytes)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * float(nbytes[i] - nbytes[a]) <= (loss[a] - loss[i]) * float(nbytes[b] - nbytes[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull


def _relax(
    groups: Sequence[Choices], fronts: Sequence[npt.NDArray[np.int64]], capacity: int
) -> tuple[list[int], float, float]:
    """Integral part, price (loss per byte) and value of the linear relaxation."""
    steps: list[tuple[float, int, int, int, int, float]] = []
    for g, (group, front) in enumerate(zip(groups, fronts, strict=True)):
        hull = front[_hull(group.nbytes[front], group.loss[front])]
        for position, (a, b) in enumerate(pairwise(hull)):
            extra = int(group.nbytes[b] - group.nbytes[a])
            gain = float(group.loss[a] - group.loss[b])
            steps.append((-gain / extra, g, position, int(b), extra, gain))
    chosen = [int(front[0]) for front in fronts]
    left = capacity - _bytes(groups, chosen)
    for slope, g, _, candidate, extra, _ in sorted(steps):
        if extra > left:
            return chosen, -slope, _loss(groups, chosen) + slope * left
        chosen[g] = candidate
        left -= extra
    return chosen, 0.0, _loss(groups, chosen)


def _fill(
    groups: Sequence[Choices], fronts: Sequence[npt.NDArray[np.int64]], start: Sequence[int], capacity: int
) -> list[int]:
    """Spend what is left on single upgrades, the one with the greatest gain first."""
    chosen = list(start)
    left = capacity - _bytes(groups, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for g, (group, front) in enumerate(zip(groups, fronts, strict=True)):
            affordable = front[group.nbytes[front] <= group.nbytes[chosen[g]] + left]
            if len(affordable) == 0:
                continue
            candidate = int(affordable[-1])
            gain = float(group.loss[chosen[g]] - group.loss[candidate])
            if gain > 0 and (best is None or gain > best[0]):
                best = (gain, g, candidate)
        if best is None:
            return chosen
        _, g, candidate = best
        left -= int(groups[g].nbytes[candidate] - groups[g].nbytes[chosen[g]])
        chosen[g] = candidate


def _finish(
    groups: Sequence[Choices],
    fronts: Sequence[npt.NDArray[np.int64]],
    capacity: int,
    price: float,
    bound: float,
    gap: float,
) -> list[int] | None:
    """Solve exactly over the candidates whose Lagrangian cost leaves room below the incumbent."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    kept: list[npt.NDArray[np.int64]] = []
    for group, front in zip(groups, fronts, strict=True):
        cost = group.loss[front] + price * group.nbytes[front]
        kept.append(front[cost - cost.min() <= gap * (1 + 1e-9)])
    owner = np.concatenate([np.full(len(front), g) for g, front in enumerate(kept)])
    nbytes = np.concatenate([group.nbytes[front] for group, front in zip(groups, kept, strict=True)])
    loss = np.concatenate([group.loss[front] for group, front in zip(groups, kept, strict=True)])
    # Small whole numbers and a gap of order one keep the solver's absolute tolerances harmless.
    base = np.array([int(group.nbytes[front].min()) for group, front in zip(groups, kept, strict=True)])
    extra = nbytes - base[owner]
    unit = gcd(*(int(e) for e in extra)) or 1
    room = (capacity - int(base.sum())) // unit
    columns = np.arange(len(owner))
    one_each = csr_array((np.ones(len(owner)), (owner, columns)), shape=(len(kept), len(owner)))
    weights = csr_array((extra / unit)[None, :])
    result = milp(
        c=(loss - bound / len(kept)) / gap * 1e3,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights, 0, room)],
        options={"node_limit": _NODE_LIMIT, "mip_rel_gap": 1e-9},
    )
    if result.x is None:
        return None
    chosen = [int(front[np.argmax(result.x[owner == g])]) for g, front in enumerate(kept)]
    return chosen if _bytes(groups, chosen) <= capacity else None
