"""Round a matrix column by column, each error made up for by the columns that are still to be rounded.

The algorithm is GPTQ's (Frantar et al., arXiv 2210.17323). With H the second moment of a layer's inputs, rounding a
weight row w to q costs (w - q) H (w - q)^T. With H^-1 = U^T U and U upper triangular, the best that the columns after
column j can do about its error e is to move by -e U[j, k] / U[j, j]. Columns are taken in the order of their moment,
the largest first, so that those that matter most are rounded with the most columns left to make up for them.

Only the ratios U[j, k] / U[j, j] are needed. Eight bits each, with one step for every row, lose nothing that can be
measured, and are all that is kept of a moment (docs/bundle.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from acip_export.errors import UnsupportedError

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Order = npt.NDArray[np.int32]

# Columns whose errors are carried to all columns behind by one product: every product reads and writes all of those.
_BLOCK = 512
# Within a block, columns whose errors are carried to each other one at a time, and to the rest of it by a product.
_NEAR = 32
# Rows that callers hand over at once: copies of them are in memory, in another order.
ROWS_AT_ONCE = 2048
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

    def round(self, values: Floats, column: int, codes: Codes, rounded: Floats) -> None:
        """Round a column.

        Args:
            values: of all rows. codes, rounded: filled with the nearest codes, and what they stand for.
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

    def round(self, values: Floats, column: int, codes: Codes, rounded: Floats) -> None:
        """See :class:`Grid`."""
        group = column // self.group
        steps, inverse = self.steps[group], self._inverse[group]
        if self.offsets is None:
            np.multiply(values, inverse, out=rounded)
        else:
            offsets = self.offsets[group]
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

    def round(self, values: Floats, column: int, codes: Codes, rounded: Floats) -> None:
        """See :class:`Grid`."""
        group = column // self.group
        found = np.searchsorted(self._middles, values * self._inverse[group])
        codes[...] = found
        np.multiply(self.levels[found], self.steps[group], out=rounded)

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


def round_with_feedback(weight: Floats, grid: Grid, factor: FeedbackFactor) -> Codes:
    """Return the codes of a matrix, (rows, columns), chosen with the errors carried forward.

    Peak memory: two more copies of ``weight``, its codes, and twice ``_BLOCK`` rows of the factor.

    Raises:
        UnsupportedError: the factor is of another number of columns.
    """
    import torch

    rows, columns = weight.shape
    if factor.size != columns:
        raise UnsupportedError(
            f"error feedback for {factor.size} inputs cannot round rows of {columns} weights: it is of another matrix"
        )
    order = torch.from_numpy(factor.order).long()
    work = torch.from_numpy(weight).T.contiguous()[order].numpy()
    codes = np.empty((columns, rows), np.int8)
    for start in range(0, columns, _BLOCK):
        _round_block(work[start:], codes[start:], grid, factor, start)
    found: Codes = torch.from_numpy(codes)[torch.argsort(order)].T.contiguous().numpy()
    return found


def _round_block(work: Floats, codes: Codes, grid: Grid, factor: FeedbackFactor, start: int) -> None:
    """Round ``_BLOCK`` columns, and carry their errors to all columns behind.

    Args:
        work: column ``start`` of the order and all behind, changed. codes: of the same, those of the block are filled.
    """
    import torch

    stop = min(start + _BLOCK, factor.size)
    count = stop - start
    carry = np.ascontiguousarray(factor.rows(start, stop)[:, start:].T)
    errors = np.empty((count, work.shape[1]), np.float32)
    # torch adds a product in place; numpy makes a copy of all the columns behind first.
    behind, factors, carried = map(torch.from_numpy, (work, carry, errors))
    for first in range(0, count, _NEAR):
        last = min(first + _NEAR, count)
        for place in range(first, last):
            values = work[place]
            if place > first:
                values -= carry[place, first:place] @ errors[first:place]
            grid.round(values, factor.order[start + place], codes[place], errors[place])
            np.subtract(values, errors[place], out=errors[place])
        behind[last:count].addmm_(factors[last:count, first:last], carried[first:last], alpha=-1)
    behind[count:].addmm_(factors[count:], carried, alpha=-1)
