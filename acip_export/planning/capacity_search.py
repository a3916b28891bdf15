"""From candidates and a budget to decisions with their exact files. A larger budget never has a greater loss.

The knapsack knows what candidates cost, but not all that a budget pays for: headers, graph and alignment depend a
little on everything together, and some of what onnxruntime holds is that of the largest matrix alone. Solving again
with what the last solution left over, as one might, is not monotone: a larger budget may end at a solution whose
surroundings are larger. So the knapsack is solved for *marks*, capacities that do not depend on the budget, and the
plan is the best of those solutions whose exact bytes are within it. More budget only adds solutions to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.formats.protocol import ExportFormat, Hole
from acip_export.planning.candidates import BoolArray, Candidates, Counted, FloatArray, IntArray
from acip_export.planning.export_sizes import ExportSizes
from acip_export.planning.knapsack import LOSS_QUANTUM, Allocation, Choices, Knapsack
from acip_export.planning.memory import Running
from acip_export.units import ceil_div

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
        repacked: what the runtime holds of the weights beside the files.
        used: bytes that count against the budget, without the fixed ones.
    """

    allocation: Allocation
    decisions: tuple[TensorDecision, ...]
    files: dict[str, int]
    repacked: int
    used: int

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    @property
    def stored(self) -> int:
        """Bytes of the tensors alone."""
        return sum(decision.nbytes for decision in self.decisions)

    @property
    def overhead(self) -> int:
        """What the allocation did not foresee."""
        return self.used - self.allocation.nbytes


@dataclass(frozen=True)
class Limit:
    """The most that any chosen candidate holds once: ``once`` bytes always, ``loading`` while loading; and the largest
    block that loading may give back to the heap."""

    once: int
    loading: int
    heap_block: int

    def held(self, running: Running) -> int:
        """Return what a choice may hold once where what is ``running`` uses bytes of loading again."""
        return self.once + sum(running.held(self.loading, self.heap_block))


@dataclass(frozen=True)
class Table:
    """All candidates of a model as one scope counts them.

    Attributes:
        candidates: one entry for each tensor.
        groups: the choices of each tensor; their bytes include what files have around a pair.
        once, loading, heap_block: (n,) what each candidate holds once, or makes room for, one tensor after the other.
        counted: which of their bytes count.
    """

    candidates: tuple[Candidates, ...]
    groups: tuple[Choices, ...]
    once: IntArray
    loading: IntArray
    heap_block: IntArray
    counted: Counted
    _knapsacks: dict[Limit | None, Knapsack] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        candidates: tuple[Candidates, ...],
        format: ExportFormat,
        *,
        counted: Counted,
        around_pair: int,
        building: int,
    ) -> Table:
        """Count the candidates of every tensor.

        Args:
            around_pair: bytes that files have around a low-rank layer beyond those around a dense one.
            building: bytes that building the tokenizer takes while loading, whatever is chosen.
        """
        held = [candidate.counted(format, counted) for candidate in candidates]
        if counted == "anonymous":
            around_pair = 0  # no file counts
        groups = tuple(
            Choices(
                each.nbytes + around_pair * candidate.table.low_rank,
                np.round(candidate.loss / LOSS_QUANTUM) * LOSS_QUANTUM,
            )
            for candidate, each in zip(candidates, held, strict=True)
        )
        loading = np.concatenate([each.loading for each in held])
        if counted != "files":
            loading = np.maximum(loading, building)
        once, heap_block = (
            np.concatenate(parts) for parts in zip(*((e.once, e.heap_block) for e in held), strict=True)
        )
        return cls(candidates, groups, once, loading, heap_block, counted)

    @cached_property
    def starts(self) -> IntArray:
        """(groups,) where each tensor's candidates begin."""
        return np.cumsum([0, *(len(group.loss) for group in self.groups[:-1])])

    @cached_property
    def nbytes(self) -> IntArray:
        """(n,) bytes of each candidate."""
        return np.concatenate([group.nbytes for group in self.groups])

    @cached_property
    def loss(self) -> FloatArray:
        """(n,) loss of each candidate."""
        return np.concatenate([group.loss for group in self.groups])

    def decisions(self, allocation: Allocation) -> tuple[TensorDecision, ...]:
        """Return what the allocation chose for each tensor."""
        return tuple(c.decision(i) for c, i in zip(self.candidates, allocation.chosen, strict=True))

    def smallest(self) -> Allocation:
        """Return the choice of the fewest bytes."""
        knapsack = self.knapsack(None)
        least = knapsack.solve(knapsack.smallest)
        assert least is not None  # the smallest candidates add up to it
        return least

    def peak(self, chosen: Sequence[int], running: Running) -> int:
        """Return what a choice holds once: what is ``running`` uses bytes of loading again."""
        at = self.starts + np.array(chosen)
        return Limit(*(int(held[at].max()) for held in (self.once, self.loading, self.heap_block))).held(running)

    def limits(self, running: Running) -> list[Limit | None]:
        """Return limits that choices may be held to; only ``None`` where nothing is held once."""
        blocks = [int(self.heap_block.max())]
        if running.hole.left_by(blocks[0]):
            blocks.insert(0, running.hole.least - 1)
        if not self.once.any() and not (self.loading > running.nbytes).any() and len(blocks) == 1:
            return [None]
        once, loading = _levels(self.once, self.starts, 0), _levels(self.loading, self.starts, running.nbytes)
        limits = [Limit(a, b, c) for a in once for b in loading for c in blocks]
        return [limit for limit in limits if np.logical_or.reduceat(self._within(limit), self.starts).all()]

    def knapsack(self, limit: Limit | None) -> Knapsack:
        """Return the knapsack of the candidates within the limit, made once."""
        if limit not in self._knapsacks:
            allowed = None if limit is None else np.split(self._within(limit), self.starts[1:])
            self._knapsacks[limit] = Knapsack(self.groups, allowed)
        return self._knapsacks[limit]

    def least_loss(self, limit: Limit | None) -> float:
        """Return the least loss of any choice within the limit, whatever it takes."""
        loss = self.loss if limit is None else np.where(self._within(limit), self.loss, np.inf)
        return float(np.minimum.reduceat(loss, self.starts).sum())

    def bounds(self, limits: Sequence[Limit | None], room: int, running: Running) -> list[float]:
        """Bound the loss of every choice that keeps within each limit and, with what it holds once, within ``room``,
        from below."""
        price = self.knapsack(None).price(room - min(_held(limit, running) for limit in limits))
        cost = self.loss + price * self.nbytes
        bounds = []
        for limit in limits:
            allowed = cost if limit is None else np.where(self._within(limit), cost, np.inf)
            least = np.minimum.reduceat(allowed, self.starts)
            unsure = 1e-12 * (float(np.abs(least).sum()) + price * abs(room))
            bounds.append(float(least.sum()) - price * (room - _held(limit, running)) - unsure)
        return bounds

    def _within(self, limit: Limit) -> BoolArray:
        return (self.once <= limit.once) & (self.loading <= limit.loading) & (self.heap_block <= limit.heap_block)


def _levels(held: IntArray, starts: IntArray, ignored: int) -> list[int]:
    """Return values worth a limit, up to ``ignored`` as one; the largest excludes nothing."""
    least = max(ignored, int(np.minimum.reduceat(held, starts).max()))
    levels = sorted({least, *(int(value) for value in np.unique(held[held > least]))})
    thinned = levels[:: ceil_div(len(levels), _MOST_LIMITS)]
    return thinned if thinned[-1] == levels[-1] else [*thinned, levels[-1]]


def _held(limit: Limit | None, running: Running) -> int:
    return 0 if limit is None else limit.held(running)


@dataclass(frozen=True)
class Search:
    """Finds the best choice within any room, for one set of candidates and one serving.

    A room is what a budget leaves for the choice: the budget without the bytes that no choice changes.
    """

    table: Table
    sizes: ExportSizes
    serving: Serving

    @cached_property
    def running(self) -> Running:
        """What comes after loading, see :meth:`Table.peak`; of budgets of files nothing."""
        return Running(0, Hole()) if self.table.counted == "files" else self.sizes.memory.running(self.serving)

    @cached_property
    def smallest(self) -> Solution:
        """The choice of the fewest bytes."""
        return self.measured(self.table.smallest())

    def best(self, room: int, *, exact: bool = True) -> Solution | None:
        """Return the best of the solutions at all marks whose exact bytes are within ``room``; ``None``: none is.

        Its allocation's lower bound is below all of them.

        Args:
            exact: see :meth:`Knapsack.solve`; without it larger budgets may have slightly greater losses.
        """
        smallest = self.smallest
        if smallest.used > room:
            return None
        around = smallest.overhead - self.table.peak(smallest.allocation.chosen, self.running)
        limits = self.table.limits(self.running)
        floors = self.table.bounds(limits, room - around, self.running)
        marks = _Marks(self, room, exact)
        best, bound = smallest, float("inf")
        for floor, limit in sorted(zip(floors, limits, strict=True), key=lambda pair: pair[0]):
            if floor > best.allocation.loss:
                bound = min(bound, floor)
                break
            knapsack, top = self.table.knapsack(limit), room - around - _held(limit, self.running)
            bound = min(bound, max(floor, knapsack.lower_bound(top)))
            best = marks.better(best, knapsack, top) or best
        lower_bound = min(bound, best.allocation.loss)
        return replace(best, allocation=replace(best.allocation, lower_bound=lower_bound))

    def largest(self) -> Solution:
        """Return the solution of least loss, whatever it takes; of several, one that holds little at once."""
        limit = min(self.table.limits(self.running), key=self.table.least_loss)
        knapsack = self.table.knapsack(limit)
        allocation = knapsack.solve(knapsack.largest)
        assert allocation is not None  # the best candidates add up to it
        if allocation.loss >= self.smallest.allocation.loss:
            return self.smallest
        solution = self.measured(allocation)
        return solution if solution.used >= self.smallest.used else self.smallest

    def measured(self, allocation: Allocation) -> Solution:
        """Return the allocation with its exact files."""
        decisions = self.table.decisions(allocation)
        files = self.sizes.files(decisions, self.serving)
        memory, stored = self.sizes.memory, sum(files.values())
        repacked = memory.held(decisions, self.serving).total
        match self.table.counted:
            case "files":
                used = stored
            case "memory":
                used = stored + repacked
            case "anonymous":
                used = memory.held_anonymous(decisions, self.serving).total
        return Solution(allocation, decisions, files, repacked, used)


@dataclass(frozen=True)
class _Marks:
    """The marks of a search, the highest first, until one has a solution within the room."""

    search: Search
    room: int
    exact: bool

    def better(self, best: Solution, knapsack: Knapsack, top: int) -> Solution | None:
        """Return the solution at the highest mark up to ``top`` that fits, if it is better than ``best``."""
        smallest = self.search.smallest
        base = smallest.allocation.nbytes
        apart = max(1, base // _MARKS)
        mark = (min(top, knapsack.largest) - base) // apart
        if top >= knapsack.largest:
            mark += 1  # the first mark that has room for everything
        tried = 0
        while mark >= 0:
            allocation = knapsack.solve(base + mark * apart, self.exact)
            if allocation is None or allocation.loss >= best.allocation.loss:
                return None
            solution = self.search.measured(allocation)
            # Below the smallest budget there are no plans, even if one with more numbers should have less around them.
            if smallest.used <= solution.used <= self.room:
                return solution
            tried += 1
            # At every mark down to its own bytes the same solution is found.
            excess = max(0, solution.used - self.room) if tried > _PATIENCE else 0
            mark = min(mark - 1, (allocation.nbytes - 1 - base) // apart, mark - excess // apart)
        return None
