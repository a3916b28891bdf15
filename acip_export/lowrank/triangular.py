"""Work with triangular matrices in their place: of 14,336 columns, in float64, each has 1.6 gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

# Columns that are solved for at once.
_BLOCK = 128
# Rows between two of the large products of :func:`add_one_`.
_ROWS = 512


def above_diagonal(size: int) -> npt.NDArray[np.bool_]:
    """Return which entries of a square matrix are above its diagonal."""
    return ~np.tri(size, dtype=np.bool_)


def invert_upper_(upper: Tensor) -> Tensor:
    """Invert an upper triangular matrix, zeros below it, in its place, and return it.

    By halves: a third of the products that solving for all columns takes.
    """
    import torch

    size = len(upper)
    if size <= _BLOCK:
        identity = torch.eye(size, dtype=upper.dtype)
        return upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
    half = size // 2
    first, last = invert_upper_(upper[:half, :half]), invert_upper_(upper[half:, half:])
    upper[:half, half:] = ((first @ upper[:half, half:]) @ last).neg_()
    return upper


def add_one_(upper: Tensor) -> Tensor:
    """Turn U into V, in its place, and return it: if U^T U is the inverse of a matrix, V^T V is that of it plus one.

    Both are upper triangular. That is U^T (1 + U U^T)^-1 U, and with 1 + U U^T = R R^T and R upper triangular, V is
    R^-1 U. R is found from the last rows to the first, those of U are not needed after that. Where numbers overflow, V
    is not finite.
    """
    import torch

    size = len(upper)
    root = torch.zeros_like(upper)
    for start in reversed(range(0, size, _ROWS)):
        stop = min(start + _ROWS, size)
        here, behind = slice(start, stop), slice(stop, size)
        panel = upper[:stop, start:] @ upper[here, start:].T
        panel.addmm_(root[:stop, behind], root[here, behind].T, alpha=-1)
        panel[here].diagonal().add_(1.0)
        # Backwards, for a lower factor of the reversed matrix is an upper one of the matrix.
        lower, failed = torch.linalg.cholesky_ex(panel[here].flip(0, 1))
        if failed:
            return upper.fill_(torch.nan)
        corner = lower.flip(0, 1)
        root[here, here] = corner
        root[:start, here] = torch.linalg.solve_triangular(corner.T, panel[:start], upper=False, left=False)
        rows = upper[here, start:]
        rows[:, stop - start :].addmm_(root[here, behind], upper[behind, behind], alpha=-1)
        rows.copy_(torch.linalg.solve_triangular(corner, rows, upper=True))
    return upper
