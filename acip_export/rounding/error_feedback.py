"""Round a matrix column by column, each error made up for by the columns that are still to be rounded.

The algorithm is GPTQ's (Frantar et al., arXiv 2210.17323). With H the second moment of a layer's inputs, rounding a
weight row w to q costs (w - q) H (w - q)^T. With H^-1 = U^T U and U upper triangular, the best that the columns after
column j can do about its error e is to move by -e U[j, k] / U[j, j]. Columns are taken in the order of their moment,
the largest first, so that those that matter most are rounded with the most columns left to make up for them.

Only the ratios U[j, k] / U[j, j] are needed. Eight bits each, with one step for every row, lose nothing that can be
measured, and are all that is kept of a moment (docs/bundle.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from acip_export.errors import UnsupportedError

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Order = npt.NDArray[np.int32]

# Columns between two matrix products: errors within a block are carried one column at a time.
_BLOCK = 128
# Rows that one thread rounds at once. A constant: sums that depend on the machine's cores would give other codes.
_ROWS = 512
# Rows that callers hand over at once: copies of them are in memory, in another order.
ROWS_AT_ONCE = 4 * _ROWS
_MOST = 127


@dataclass(frozen=True, eq=False)
class FeedbackFactor:
    """How the errors of a matrix's columns are carried forward.

    Attributes:
        order: (n,) the columns, in the order in which they are rounded.
        codes: (n (n - 1) / 2,) the factor above its diagonal of ones, row by row, in units of ``steps``.
        steps: (n,) one for every row.
    """

    order: Order
    codes: Codes
    steps: Floats

    @property
    def size(self) -> int:
        """How many columns the matrix has."""
        return len(self.order)

    @classmethod
    def coded(cls, order: Order, upper: Floats) -> FeedbackFactor:
        """Take U, (n, n) and upper triangular with positive diagonal, its columns in their order."""
        size, place = len(order), 0
        codes, steps = np.empty(size * (size - 1) // 2, np.int8), np.zeros(size, np.float32)
        for row in range(size - 1):
            ratios = upper[row, row + 1 :] / upper[row, row]
            steps[row] = step = max(ratios.max(), -ratios.min()) / _MOST
            codes[place : place + len(ratios)] = np.rint(ratios / step) if step > 0 else 0
            place += len(ratios)
        return cls(order, codes, steps)

    def check(self, name: str) -> None:
        """Refuse numbers that are no factor. Raises ValueError that begins with ``name``."""
        size = self.size
        if self.codes.shape != (size * (size - 1) // 2,) or self.steps.shape != (size,):
            raise ValueError(f"{name} has {self.codes.size} codes and {self.steps.size} steps for {size} columns")
        if not np.array_equal(np.sort(self.order), np.arange(size)):
            raise ValueError(f"{name} has an order that does not name every column once")
        if not np.isfinite(self.steps).all():
            raise ValueError(f"{name} has steps that are not finite")

    def rows(self, start: int, stop: int) -> Floats:
        """Return rows ``start`` to ``stop`` of the factor, (stop - start, n), zeros up to the diagonal."""
        size = self.size
        found = np.zeros((stop - start, size), np.float32)
        for row in range(start, stop):
            first = row * (size - 1) - row * (row - 1) // 2
            count = size - 1 - row
            np.multiply(self.codes[first : first + count], self.steps[row], out=found[row - start, row + 1 :])
        return found


class Grid(Protocol):
    """The numbers that each weight of a matrix may be rounded to, its scales chosen."""

    def round(self, values: Floats, column: int, rows: slice, codes: Codes, rounded: Floats) -> None:
        """Round part of a column.

        Args:
            values: of the column's ``rows``. codes, rounded: filled with the nearest codes, and what they stand for.
        """
        ...


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """Codes ``lowest`` to ``highest`` that stand for ``step * code + offset``.

    Attributes:
        steps, offsets: (groups, rows); ``None``: no offsets. group: columns that share them.
    """

    steps: Floats
    offsets: Floats | None
    group: int
    lowest: int
    highest: int

    def round(self, values: Floats, column: int, rows: slice, codes: Codes, rounded: Floats) -> None:
        """See :class:`Grid`."""
        group = column // self.group
        steps, inverse = self.steps[group, rows], self._inverse[group, rows]
        if self.offsets is None:
            np.multiply(values, inverse, out=rounded)
        else:
            offsets = self.offsets[group, rows]
            np.subtract(values, offsets, out=rounded)
            rounded *= inverse
        np.rint(rounded, out=rounded)
        np.maximum(rounded, np.float32(self.lowest), out=rounded)
        np.minimum(rounded, np.float32(self.highest), out=rounded)
        codes[...] = rounded
        rounded *= steps
        if self.offsets is not None:
            rounded += offsets

    @cached_property
    def _inverse(self) -> Floats:
        return _reciprocal(self.steps)


@dataclass(frozen=True, eq=False)
class TableGrid:
    """Codes that stand for ``step * levels[code]``.

    Attributes:
        steps: (groups, rows). levels: growing. group: columns that share a step.
    """

    steps: Floats
    levels: Floats
    group: int

    def round(self, values: Floats, column: int, rows: slice, codes: Codes, rounded: Floats) -> None:
        """See :class:`Grid`."""
        group = column // self.group
        found = np.searchsorted(self._middles, values * self._inverse[group, rows])
        codes[...] = found
        np.multiply(self.levels[found], self.steps[group, rows], out=rounded)

    @cached_property
    def _middles(self) -> Floats:
        middles: Floats = (self.levels[1:] + self.levels[:-1]) * np.float32(0.5)
        return middles

    @cached_property
    def _inverse(self) -> Floats:
        return _reciprocal(self.steps)


def _reciprocal(steps: Floats) -> Floats:
    """Return 1 / steps, and 0 where that overflows."""
    safe: Floats = np.divide(1, steps, out=np.zeros_like(steps), where=np.abs(steps) > np.finfo(np.float32).tiny)
    return safe


def round_with_feedback(weight: Floats, grid: Grid, factor: FeedbackFactor, threads: int) -> Codes:
    """Return the codes of a matrix, (rows, columns), chosen with the errors carried forward.

    Peak memory: one more copy of ``weight``, its codes, and ``_BLOCK`` rows of the factor.

    Raises:
        UnsupportedError: the factor is of another number of columns.
    """
    rows, columns = weight.shape
    if factor.size != columns:
        raise UnsupportedError(
            f"error feedback for {factor.size} inputs cannot round rows of {columns} weights: it is of another matrix"
        )
    work = np.ascontiguousarray(weight.T[factor.order])
    codes = np.empty((columns, rows), np.int8)
    parts = [slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
    with ThreadPoolExecutor(max(1, min(threads, len(parts)))) as pool:
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            upper = factor.rows(start, stop)
            block = _Block(start, factor.order[start:stop].tolist(), upper)
            for done in [pool.submit(block.round, work, codes, grid, part) for part in parts]:
                done.result()
    found = np.empty((rows, columns), np.int8)
    found[:, factor.order] = codes.T
    return found


class _Block:
    """Some of the columns, in the order of rounding, and how their errors are carried."""

    def __init__(self, start: int, columns: Sequence[int], upper: Floats) -> None:
        self.start, self.columns = start, columns
        stop = start + len(columns)
        self.within = np.ascontiguousarray(upper[:, start:stop].T)
        self.behind = np.ascontiguousarray(upper[:, stop:].T)

    def round(self, work: Floats, codes: Codes, grid: Grid, rows: slice) -> None:
        """Round these columns of ``rows``, and carry their errors to all columns behind."""
        errors = np.empty((len(self.columns), rows.stop - rows.start), np.float32)
        for number, column in enumerate(self.columns):
            place = self.start + number
            values = work[place, rows]
            if number:
                values -= self.within[number, :number] @ errors[:number]
            grid.round(values, column, rows, codes[place, rows], errors[number])
            np.subtract(values, errors[number], out=errors[number])
        if len(self.behind):
            work[self.start + len(self.columns) :, rows] -= self.behind @ errors
