"""Round a matrix so that each weight's rounding error is made up for by the weights that are still to be rounded.

The algorithm is GPTQ's (Frantar et al., arXiv 2210.17323). With H the second moment of a layer's inputs, rounding a
weight row w to q costs (w - q) H (w - q)^T. With H^-1 = U^T U and U upper triangular, the best that the columns after
column j can do about its error e is to move by -e U[j, k] / U[j, j]. Columns are taken in the order of their moment,
the largest first, so that those that matter most are rounded with the most columns left to make up for them.

Where G, the second moment of the loss gradient at the layer's outputs, is known as well, rounding W to Q costs
tr(G (W - Q) H (W - Q)^T), and rows make up for the rows before them, too (as in Tseng et al., arXiv 2505.22988). With
G^-1 = V^T V, a row i that is rounded with the errors e, one for each column, moves the k-th of the rows after it by
-e V[i, k] / V[i, i]. A row is rounded, column by column, when all rows before it have moved it.

Only the ratios U[j, k] / U[j, j] are needed. Eight bits each, with one step for every row, lose nothing that can be
measured, and are all that is kept of a moment (docs/bundle.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from acip_export.errors import UnsupportedError
from acip_export.units import ceil_div

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Order = npt.NDArray[np.int32]

# Columns whose errors are carried to all columns behind by one product, and rows to all rows below: less is slow, more
# is done weight by weight.
_COLUMNS, _ROWS = 128, 128
# Rows that make up for each other's errors, and that callers hand over at once: copies of them are in memory.
ROWS_AT_ONCE = 2048
_MOST = 127


@dataclass(frozen=True, eq=False)
class FeedbackFactor:
    """How the errors of a matrix's columns, or of its rows, are carried forward.

    Attributes:
        order: (n,) the columns or rows, in the order in which they are rounded.
        codes: (n (n - 1) / 2,) the factor above its diagonal of ones, row by row, in units of ``steps``.
        steps: (n,) one for every row.
    """

    order: Order
    codes: Codes
    steps: Floats

    @property
    def size(self) -> int:
        """How many columns or rows the matrix has."""
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
        kinds = ((self.order, np.int32), (self.codes, np.int8), (self.steps, np.float32))
        if any(array.dtype != kind or array.ndim != 1 for array, kind in kinds):
            raise ValueError(f"{name} has numbers of another kind")
        size = self.size
        if self.codes.shape != (size * (size - 1) // 2,) or self.steps.shape != (size,):
            raise ValueError(f"{name} has {self.codes.size} codes and {self.steps.size} steps for {size} places")
        if not np.array_equal(np.sort(self.order), np.arange(size)):
            raise ValueError(f"{name} has an order that does not name every place once")
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


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers that each weight of a matrix may be rounded to: ``step * code + offset``, or ``step * levels[code]``.

    Attributes:
        steps: (rows, groups). group: columns that share one. lowest, highest: of the codes.
        offsets: (rows, groups). levels: growing, one for every code from 0 on; without offsets.
    """

    steps: Floats
    group: int
    lowest: int
    highest: int
    offsets: Floats | None = None
    levels: Floats | None = None


def round_with_feedback(
    weight: Floats, grid: Grid, factor: FeedbackFactor, row_factor: FeedbackFactor | None = None
) -> Codes:
    """Return the codes of a matrix, (rows, columns), chosen with the errors carried forward.

    Peak memory: three more copies of ``weight``, its codes twice, ``_COLUMNS`` rows of the factor, and those of rows.

    Args:
        factor: how errors are carried from column to column.
        row_factor: how they are carried from row to row; ``None``: rows are independent.

    Raises:
        UnsupportedError: a factor is of another number of columns or rows.
    """
    rows, columns = weight.shape
    if factor.size != columns:
        raise UnsupportedError(
            f"error feedback for {factor.size} inputs cannot round rows of {columns} weights: it is of another matrix"
        )
    if row_factor is not None and row_factor.size != rows:
        raise UnsupportedError(
            f"error feedback for {row_factor.size} outputs cannot round {rows} rows: it is of another matrix"
        )
    order = slice(None) if row_factor is None else row_factor.order
    down = None if row_factor is None else row_factor.rows(0, rows)
    # Twice: indexing by rows and columns at once takes ten times as long.
    work = np.take(weight[order], factor.order, axis=1)
    carried, codes = np.zeros_like(work), np.empty(work.shape, np.int8)
    scales = _Scales.of(grid, order)
    for start in range(0, columns, _COLUMNS):
        _round_block(work, carried, codes, scales, factor, down, slice(start, min(start + _COLUMNS, columns)))
    found = np.empty_like(codes)
    found[order] = np.take(codes, np.argsort(factor.order), axis=1)
    return found


@dataclass(frozen=True)
class _Scales:
    """A grid as the kernel takes it: steps, inverses and offsets (rows, groups), in the order of rounding."""

    steps: Floats
    inverses: Floats
    offsets: Floats
    levels: Floats
    middles: Floats
    lowest: np.float32
    highest: np.float32
    group: int

    @classmethod
    def of(cls, grid: Grid, order: Order | slice) -> _Scales:
        # Arrays that may be written to: each other kind would be compiled for.
        steps = np.array(grid.steps[order])
        offsets = np.zeros_like(steps) if grid.offsets is None else np.array(grid.offsets[order])
        levels = np.empty(0, np.float32) if grid.levels is None else np.array(grid.levels)
        middles = (levels[1:] + levels[:-1]) * np.float32(0.5)
        ends = np.float32(grid.lowest), np.float32(grid.highest)
        return cls(steps, _reciprocal(steps), offsets, levels, middles, *ends, grid.group)

    def of_rows(self, rows: slice) -> tuple[Floats | np.float32, ...]:
        scales = self.steps[rows], self.inverses[rows], self.offsets[rows]
        return *scales, self.levels, self.middles, self.lowest, self.highest


def _round_block(
    work: Floats,
    carried: Floats,
    codes: Codes,
    scales: _Scales,
    factor: FeedbackFactor,
    down: Floats | None,
    block: slice,
) -> None:
    """Round a block of columns, and carry its errors to all columns behind.

    Args:
        work: the weights. carried: what the columns before have carried to each; changed behind the block.
        codes: those of the block are filled. All of these in the order of rounding.
        down: how errors are carried to the rows below, (rows, rows) with zeros up to the diagonal.
    """
    import torch

    from acip_export.rounding.feedback_kernel import round_tile

    rows, columns = work.shape
    behind = factor.rows(block.start, block.stop)
    near = np.ascontiguousarray(behind[:, block])
    targets, moved = np.ascontiguousarray(work[:, block]), np.ascontiguousarray(carried[:, block])
    chosen, errors = np.empty(targets.shape, np.int8), np.empty_like(targets)
    groups = factor.order[block].astype(np.int64) // scales.group
    for start in range(0, rows, _ROWS):
        tile = slice(start, min(start + _ROWS, rows))
        inside = np.empty((0, 0), np.float32) if down is None else np.ascontiguousarray(down[tile, tile])
        round_tile(targets[tile], moved[tile], near, inside, *scales.of_rows(tile), groups, chosen[tile], errors[tile])
        if down is not None and tile.stop < rows:
            # torch adds a product in place; numpy makes a copy of all the rows below first.
            share = torch.from_numpy(down[tile, tile.stop :]).T
            torch.from_numpy(targets[tile.stop :]).addmm_(share, torch.from_numpy(targets[tile]), alpha=-1)
    if not np.isfinite(errors).all():
        raise UnsupportedError("a matrix cannot be rounded with error feedback: its numbers, or the factors', overflow")
    codes[:, block] = chosen
    if block.stop < columns:
        share = torch.from_numpy(behind[:, block.stop :])
        torch.from_numpy(carried)[:, block.stop :].addmm_(torch.from_numpy(errors), share)


def rows_at_once(
    weight: torch.Tensor, row_feedback: Sequence[FeedbackFactor] | None
) -> Iterator[tuple[torch.Tensor, FeedbackFactor | None]]:
    """Yield at most ``ROWS_AT_ONCE`` rows of a matrix after the other, and how errors are carried among them.

    Raises:
        UnsupportedError: ``row_feedback`` is of another number of rows.
    """
    if row_feedback is None:
        yield from ((some, None) for some in weight.split(ROWS_AT_ONCE))  # type: ignore[no-untyped-call]
        return
    sizes = [factor.size for factor in row_feedback]
    if sum(sizes) != len(weight):
        raise UnsupportedError(
            f"error feedback for {sum(sizes)} outputs cannot round {len(weight)} rows: it is of another matrix"
        )
    yield from zip(weight.split(sizes), row_feedback, strict=True)  # type: ignore[no-untyped-call]


def row_parts(rows: int) -> list[int]:
    """Return into how many rows each a matrix is cut that carries errors from row to row: parts of about one size."""
    size = ceil_div(rows, ceil_div(rows, ROWS_AT_ONCE)) if rows else 1
    return [min(size, rows - start) for start in range(0, rows, size)]


def _reciprocal(steps: Floats) -> Floats:
    """Return 1 / steps, and 0 where that overflows."""
    safe: Floats = np.divide(1, steps, out=np.zeros_like(steps), where=np.abs(steps) > np.finfo(np.float32).tiny)
    return safe
