"""Multiply with roots of second moments, and undo it: the changes of basis that components are found in.

Any root R of a moment R R^T does, triangular or not: two roots differ by a rotation, which the singular vectors take
up, so that the components are the same. Each kind of moment brings the root that costs it least.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from acip_export.lowrank.moments import Floats, PackedMoment, column_basis, lifted, output_scale

# Added to the moments, as a share of their mean eigenvalue: directions that the calibration text never excited.
DAMPING = 1e-4
# Columns are orthonormal if no product of two is off by more: a root of them is off by a thousand times that at most.
_ORTHONORMAL = 1e-8


class Whitening(ABC):
    """Know a second moment (n, n) by a root R (n, n), float64, of it, which is damped where it may have no inverse.

    Roots are made when they are asked for, and kept: no lock is taken, so that several threads make theirs side by
    side.

    Attributes:
        identity: what the moment was made from, where there is such a thing: sums of products differ with the threads.
    """

    identity: bytes = b""

    @staticmethod
    def of(moment: Tensor) -> Whitening:
        """Take a moment as it is, float64."""
        return _Triangular(moment)

    @staticmethod
    def packed(packed: PackedMoment, name: str = "the second moment") -> Whitening:
        """Take a moment of a score file, which comes with a root.

        Raises:
            ScoreFileError: it overflows; the message begins with ``name``.
        """
        return _Packed(packed, name)

    @staticmethod
    def lifted(part: Whitening, diagonal: Floats, weight: Tensor) -> Whitening:
        """Take the moment (out, out) of which ``part`` is what :func:`acip_export.lowrank.moments.projected` kept."""
        return _Lifted(part, diagonal, weight)

    @property
    @abstractmethod
    def moment(self) -> Tensor:
        """Return the moment, without damping."""

    @abstractmethod
    def of_columns(self, matrix: Tensor) -> Tensor:
        """Multiply ``matrix`` (n, k), whose columns the moment is about, by R^T."""

    @abstractmethod
    def undone_columns(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`of_columns`."""

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Multiply ``matrix`` (k, n), whose rows the moment is about, by R."""
        return self.of_columns(matrix.T).T

    def undone_rows(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`of_rows`."""
        return self.undone_columns(matrix.T).T

    @property
    def digest(self) -> bytes:
        """Return a SHA-256 that names the moment."""
        return hashlib.sha256(self.identity or self.moment.cpu().contiguous().numpy().data).digest()


class _Triangular(Whitening):
    """Have a Cholesky factor as the root: a thirtieth of an eigendecomposition, and no inverse."""

    def __init__(self, moment: Tensor) -> None:
        self._moment = moment
        self._lower: Tensor | None = None

    @property
    def moment(self) -> Tensor:
        return self._moment

    def _root(self) -> Tensor:
        if self._lower is None:
            self._lower = triangular_root(self._moment)
        return self._lower

    def of_columns(self, matrix: Tensor) -> Tensor:
        product: Tensor = self._root().T @ matrix
        return product

    def undone_columns(self, matrix: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve_triangular(self._root().T, matrix, upper=True)
        return solution


class _Packed(Whitening):
    """Have the root that a score file holds: no factorization, and the inverse for nothing."""

    def __init__(self, packed: PackedMoment, name: str) -> None:
        self._packed, self._name, self.identity = packed, name, packed.digest
        self._known: tuple[Tensor, Tensor] | None = None

    @property
    def moment(self) -> Tensor:
        return self._packed.unpacked(self._name)

    def _root(self) -> tuple[Tensor, Tensor]:
        if self._known is None:
            self._known = self._packed.root(DAMPING, self._name)
        return self._known

    def of_columns(self, matrix: Tensor) -> Tensor:
        return self._root()[0].T @ matrix

    def undone_columns(self, matrix: Tensor) -> Tensor:
        return self._root()[1].T @ matrix


class _Lifted(Whitening):
    """Have the root D^1/2 (I + P (R - I) P^T), with R the part's: see :func:`acip_export.lowrank.moments.lifted`.

    It is one if the columns of P are orthonormal; where a weight has dependent columns, the whole moment is factorized.
    """

    def __init__(self, part: Whitening, diagonal: Floats, weight: Tensor) -> None:
        self._part, self._diagonal, self._weight = part, diagonal, weight
        self.identity = part.identity + diagonal.tobytes()
        self._scale = output_scale(torch.from_numpy(diagonal))[:, None]
        self._basis: Tensor | None = None
        self._whole: Whitening | None = None

    @property
    def moment(self) -> Tensor:
        return lifted(self._part.moment, self._diagonal, self._weight)

    def of_columns(self, matrix: Tensor) -> Tensor:
        self._prepare()
        if self._whole is not None:
            return self._whole.of_columns(matrix)
        return self._inside(matrix * self._scale, self._part.of_columns)

    def undone_columns(self, matrix: Tensor) -> Tensor:
        self._prepare()
        if self._whole is not None:
            return self._whole.undone_columns(matrix)
        return self._inside(matrix, self._part.undone_columns) / self._scale

    def _inside(self, matrix: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Have ``change`` done to what lies in the span of the columns of P."""
        assert self._basis is not None
        inside = self._basis.T @ matrix
        return matrix + self._basis @ (change(inside) - inside)

    def _prepare(self) -> None:
        if self._basis is None:
            self._basis = basis = column_basis(self._weight, self._scale[:, 0])
            off = (basis.T @ basis).fill_diagonal_(0.0).abs().max(), (basis.square().sum(0) - 1).abs().max()
            if not float(max(off)) < _ORTHONORMAL:
                self._whole = Whitening.of(self.moment)


def triangular_root(moment: Tensor) -> Tensor:
    """Return L, lower triangular, with L L^T the damped second moment, float64.

    Rounding can leave a moment that is not positive definite even when damped: then its negative eigenvalues count as
    (almost) none.
    """
    damped = moment.to(torch.float64, copy=True)
    damped.diagonal().add_(DAMPING * moment.diagonal().double().mean())
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(damped)
    # With X = V sqrt(values): X X^T is the moment, and X^T = Q R gives R^T R.
    root: Tensor = torch.linalg.qr((vectors * values.clamp_min(1e-30).sqrt()).T).R.T
    return root * root.diagonal().sign()
