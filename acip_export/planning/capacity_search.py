"""From candidates and a budget to decisions with their exact files. A larger budget never has a greater loss.

The knapsack knows what candidates cost, but not all that a budget pays for: headers, graph and alignment depend a
little on everything together, and some of what onnxruntime holds is that of the largest matrix alone. Solving again
with what the last solution left over, as one might, is not monotone: a larger budget may end at a solution whose
surroundings are larger. So the knapsack is solved for *marks*, capacities that do not depend on the budget, and the
plan is the best of those solutions whose exact bytes are within it. More budget only adds solutions to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.plan import TensorDecision
from acip_export.formats.protocol import ExportFormat
from acip_export.planning.candidates import Candidates
from acip_export.planning.knapsack import LOSS_QUANTUM, Allocation, Choices, Knapsack

# Marks are this share of the smallest plan apart: what they leave unspent is a thousandth of a per cent.
_MARKS = 1 << 16
# Solutions that turn out too large are looked at one by one so often, then in strides of what they were too large by.
_PATIENCE = 24
# Limits on the largest matrix's share; more would be solved for than could ever matter.
_MOST_LIMITS = 24


@dataclass(frozen=True)
class Solution:
    """One allocation with its exact files.

    Attributes:
        repacked: what the runtime keeps of the weights beside the files.
        used: bytes that count against the budget, without the fixed ones.
    """

    allocation: Allocation
    decisions: tuple[TensorDecision, ...]
    files: dict[str, int]
    repacked: int
    used: int

    @property
    def file_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def stored(self) -> int:
        return sum(decision.nbytes for decision in self.decisions)

    @property
    def overhead(self) -> int:
        """What the allocation did not foresee."""
        return self.used - self.allocation.nbytes


Exactly = Callable[[Allocation], Solution]


@dataclass(frozen=True)
class Limit:
    """The most that any chosen candidate holds once: ``once`` bytes always, ``loading`` while loading."""

    once: int
    loading: int


@dataclass(frozen=True)
class Table:
    """All candidates of a model as one scope counts them. What a limit needs is made when it is asked for, and kept.

    Attributes:
        groups: of each tensor; bytes with what the file has around a pair.
        once, loading: (n,) of every candidate, one tensor after the other: what is held for the largest matrix alone.
    """

    groups: tuple[Choices, ...]
    once: npt.NDArray[np.int64]
    loading: npt.NDArray[np.int64]
    _knapsacks: dict[Limit | None, Knapsack] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, candidates: Sequence[Candidates], target: ExportFormat, scope: str, around_pair: int) -> Table:
        groups = []
        for candidate in candidates:
            nbytes = candidate.nbytes(target, scope) + around_pair * candidate.table.low_rank
            groups.append(Choices(nbytes, np.round(candidate.loss / LOSS_QUANTUM) * LOSS_QUANTUM))
        peaks = [candidate.peaks(target, scope) for candidate in candidates]
        return cls(tuple(groups), np.concatenate([p[0] for p in peaks]), np.concatenate([p[1] for p in peaks]))

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(len(group.loss) for group in self.groups[:-1])])

    @cached_property
    def nbytes(self) -> npt.NDArray[np.int64]:
        return np.concatenate([group.nbytes for group in self.groups])

    @cached_property
    def loss(self) -> npt.NDArray[np.float64]:
        return np.concatenate([group.loss for group in self.groups])

    def smallest(self) -> Allocation:
        knapsack = self.knapsack(None)
        least = knapsack.solve(knapsack.smallest)
        assert least is not None  # the smallest candidates add up to it
        return least

    def peak(self, chosen: Sequence[int], running: int) -> int:
        """What a choice holds once: ``running`` bytes of loading are used again by what comes after it."""
        at = self.starts + np.array(chosen)
        return int(self.once[at].max()) + max(0, int(self.loading[at].max()) - running)

    def limits(self, running: int) -> list[Limit | None]:
        """Pairs of limits that choices may be held to; ``None`` where nothing is held once."""
        if not self.once.any() and not (self.loading > running).any():
            return [None]
        once, loading = _levels(self.once, self.starts, 0), _levels(self.loading, self.starts, running)
        limits = [Limit(a, b) for a in once for b in loading]
        return [limit for limit in limits if np.logical_or.reduceat(self._within(limit), self.starts).all()]

    def _within(self, limit: Limit) -> npt.NDArray[np.bool_]:
        return (self.once <= limit.once) & (self.loading <= limit.loading)

    def knapsack(self, limit: Limit | None) -> Knapsack:
        """Of the candidates within the limit."""
        if limit not in self._knapsacks:
            allowed = None if limit is None else np.split(self._within(limit), self.starts[1:])
            self._knapsacks[limit] = Knapsack(self.groups, allowed)
        return self._knapsacks[limit]

    def bounds(self, limits: Sequence[Limit | None], room: int, running: int) -> list[float]:
        """Below the loss of every choice that keeps within each limit and, with what it holds once, within ``room``."""
        price = self.knapsack(None).price(room - min(_held(limit, running) for limit in limits))
        cost = self.loss + price * self.nbytes
        found = []
        for limit in limits:
            allowed = cost
            if limit is not None:
                allowed = np.where(self._within(limit), cost, np.inf)
            least = np.minimum.reduceat(allowed, self.starts)
            unsure = 1e-12 * (float(np.abs(least).sum()) + price * abs(room))
            found.append(float(least.sum()) - price * (room - _held(limit, running)) - unsure)
        return found


def _levels(held: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ignored: int) -> list[int]:
    """Values worth a limit, up to ``ignored`` as one; the largest excludes nothing."""
    least = max(ignored, int(np.minimum.reduceat(held, starts).max()))
    levels = sorted({least, *(int(value) for value in np.unique(held[held > least]))})
    thinned = levels[:: -(-len(levels) // _MOST_LIMITS)]
    return thinned if thinned[-1] == levels[-1] else [*thinned, levels[-1]]


def _held(limit: Limit | None, running: int) -> int:
    return 0 if limit is None else limit.once + max(0, limit.loading - running)


def solve(table: Table, smallest: Solution, room: int, running: int, exactly: Exactly, exact: bool) -> Solution:
    """The best of the solutions at all marks whose exact bytes are within ``room``.

    Args:
        smallest: of the smallest bytes; within ``room``. running: see :meth:`Table.peak`.
        exact: see :meth:`Knapsack.solve`; without it larger budgets may have slightly greater losses.

    Returns:
        The solution; its allocation's bound is on all of them.
    """
    base = smallest.allocation.nbytes
    around = smallest.overhead - table.peak(smallest.allocation.chosen, running)
    limits = table.limits(running)
    best, bound = smallest, float("inf")
    for floor, limit in sorted(
        zip(table.bounds(limits, room - around, running), limits, strict=True), key=lambda pair: pair[0]
    ):
        if floor > best.allocation.loss:
            bound = min(bound, floor)
            break
        knapsack, top = table.knapsack(limit), room - around - _held(limit, running)
        bound = min(bound, max(floor, knapsack.lower_bound(top)))
        found = _at_marks(knapsack, base, top, room, smallest, best, exactly, exact)
        if found is not None:
            best = found
    allocation = best.allocation
    lower = min(bound, allocation.loss)
    proven = Allocation(allocation.chosen, allocation.nbytes, allocation.loss, lower, allocation.proven)
    return Solution(proven, best.decisions, best.files, best.repacked, best.used)


def _at_marks(
    knapsack: Knapsack,
    base: int,
    top: int,
    room: int,
    smallest: Solution,
    best: Solution,
    exactly: Exactly,
    exact: bool,
) -> Solution | None:
    """The solution at the highest mark up to ``top`` that fits, if it is better than ``best``."""
    apart = max(1, base // _MARKS)
    mark = (min(top, knapsack.largest) - base) // apart
    if top >= knapsack.largest:
        mark += 1  # the first mark that has room for everything
    tried = 0
    while mark >= 0:
        allocation = knapsack.solve(base + mark * apart, exact)
        if allocation is None or allocation.loss >= best.allocation.loss:
            return None
        solution = exactly(allocation)
        # Below the smallest budget there are no plans, even if one with more numbers should have less around them.
        if smallest.used <= solution.used <= room:
            return solution
        tried += 1
        # At every mark down to its own bytes the same solution is found.
        excess = max(0, solution.used - room) if tried > _PATIENCE else 0
        mark = min(mark - 1, (allocation.nbytes - 1 - base) // apart, mark - excess // apart)
    return None
