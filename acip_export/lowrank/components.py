"""Factorize a weight into singular components, in a whitened basis. Ranking and materializing both start from here.

With H = E[x x^T] (inputs) and G = E[g g^T] (output gradients), the components are those of
svd(G^(1/2) W H^(1/2)), carried back: W = up @ down with up = G^(-1/2) U S^(1/2) and down = S^(1/2) V^T H^(-1/2).
Any roots of G and H give the same components: see :class:`Whitening`.
Without G this is SVD-LLM's input whitening, without either the plain SVD. In the two-sided basis half the squared
singular value is the predicted loss of dropping the component (Kronecker-factored Fisher).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Added to the moments, as a share of their mean eigenvalue: directions that the calibration text never excited.
DAMPING = 1e-4
# Largest ratio of singular values that is factorized through the Gram matrix: 1e-16 * 2e4^2 is float32's half unit.
GRAM_RANGE = 2e4


@dataclass(frozen=True)
class Whitening:
    """Hold a second moment (n, n) float64, and the triangular root of it, damped, which is made when asked for.

    Any root does, triangular or symmetric: they differ by a rotation, which the singular vectors take up, so that the
    components are the same. A Cholesky factor costs a thirtieth of an eigendecomposition, and no inverse.

    Attributes:
        identity: what the moment was made from, where there is such a thing: sums of products differ with the threads.
    """

    moment: Tensor
    identity: bytes = b""

    @classmethod
    def of(cls, moment: Tensor, identity: bytes = b"") -> Whitening:
        return cls(moment, identity)

    @cached_property
    def lower(self) -> Tensor:
        """Return L, lower triangular, with L L^T the damped moment."""
        return triangular_root(self.moment)

    def of_columns(self, matrix: Tensor) -> Tensor:
        """Multiply ``matrix`` (n, k), whose columns the moment is about, by L^T."""
        product: Tensor = self.lower.T @ matrix
        return product

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Multiply ``matrix`` (k, n), whose rows the moment is about, by L."""
        product: Tensor = matrix @ self.lower
        return product

    def undone_columns(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`of_columns`."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower.T, matrix, upper=True)
        return solution

    def undone_rows(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`of_rows`."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower, matrix, upper=False, left=False)
        return solution

    @cached_property
    def digest(self) -> bytes:
        """Return a SHA-256 that names the moment."""
        return hashlib.sha256(self.identity or self.moment.cpu().contiguous().numpy().data).digest()


@dataclass(frozen=True)
class Components:
    """Hold the factors of ``weight = up @ down``, component by component.

    Attributes:
        up: (out, k). down: (k, in). singular: (k,) descending, of the whitened weight. All float32, or float64 for a
            float64 weight.
    """

    up: Tensor
    down: Tensor
    singular: Tensor


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


def components(weight: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> Components:
    """Factorize ``weight`` (out, in) in the basis given by the moments; ``None`` stands for the identity."""
    return whitened_components(
        weight,
        None if input_moment is None else Whitening.of(input_moment),
        None if gradient_moment is None else Whitening.of(gradient_moment),
    )


def component_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the components of ``weight``."""
    return torch.promote_types(weight.dtype, torch.float32)


def whitened_components(weight: Tensor, right: Whitening | None, left: Whitening | None) -> Components:
    """Factorize as :func:`components`, with the roots of input (``right``) and gradient moment (``left``) at hand."""
    whitened = weight.double()
    dtype = component_dtype(weight)
    if left is not None:
        whitened = left.of_columns(whitened)
    if right is not None:
        whitened = right.of_rows(whitened)
    u, s, vt = thin_svd(whitened)
    scale = s.sqrt()
    up = u * scale
    down = scale[:, None] * vt
    return Components(
        up=(up if left is None else left.undone_columns(up)).to(dtype),
        down=(down if right is None else right.undone_rows(down)).to(dtype),
        singular=s.to(dtype),
    )


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U, S, V^T of a float64 matrix, k = min(m, n), through its Gram matrix where that is accurate enough.

    The eigenvectors of the smaller Gram matrix are one side, the matrix times them the other: their product is exact,
    but the other side's rows are orthogonal, and the singular values right, only up to 1e-16 (s_1 / s_i)^2. Up to
    :data:`GRAM_RANGE` that is below what float32 factors can show; wider spectra take the slower SVD.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    if not float(values[-1]) * GRAM_RANGE**2 > float(values[0]):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vt
    s = values.sqrt()
    if tall:
        return (matrix @ vectors) / s, s, vectors.T
    return vectors, s, (vectors.T @ matrix) / s[:, None]


def balance(
    up: Tensor, down: Tensor, right: Whitening | None, left: Whitening | None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the best pair of ``rank`` for ``up @ down`` in the whitened norm; both factors get the same singular values.

    QR of both sides and one small SVD. ``up`` (out, r), ``down`` (r, in); returns float32 (out, rank), (rank, in), in
    descending order of the singular values.
    """
    left_side, right_side = up.double(), down.double()
    if left is not None:
        left_side = left.of_columns(left_side)
    if right is not None:
        right_side = right.of_rows(right_side)
    q_up, r_up = torch.linalg.qr(left_side)
    q_down, r_down = torch.linalg.qr(right_side.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    scale = s[:rank].sqrt()
    up = q_up @ (u[:, :rank] * scale)
    down = (scale[:, None] * vt[:rank]) @ q_down.T
    return (
        (up if left is None else left.undone_columns(up)).float(),
        (down if right is None else right.undone_rows(down)).float(),
    )


def fold(
    up: Tensor,
    down: Tensor,
    adapter_up: Tensor,
    adapter_down: Tensor,
    right: Whitening | None,
    left: Whitening | None,
) -> tuple[Tensor, Tensor]:
    """Find the best pair of the same rank for ``up @ down + adapter_up @ adapter_down``; see :func:`balance`."""
    return balance(torch.cat([up, adapter_up], dim=1), torch.cat([down, adapter_down]), right, left, up.shape[1])
