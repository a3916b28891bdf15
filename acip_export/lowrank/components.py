"""Factorize a weight into singular components, in a whitened basis. Ranking and materializing both start from here.

With H = E[x x^T] (inputs) and G = E[g g^T] (output gradients), the components are those of
svd(G^(1/2) W H^(1/2)), carried back: W = up @ down with up = G^(-1/2) U S^(1/2) and down = S^(1/2) V^T H^(-1/2).
Any roots of G and H give the same components: see :mod:`acip_export.lowrank.whitening`.
Without G this is SVD-LLM's input whitening, without either the plain SVD. In the two-sided basis half the squared
singular value is the predicted loss of dropping the component (Kronecker-factored Fisher).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acip_export.lowrank.whitening import Whitening

# Largest ratio of singular values that is factorized through the Gram matrix: 1e-16 * 2e4^2 is float32's half unit.
GRAM_RANGE = 2e4


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
    del whitened  # what is as large as the weight counts: see components_bytes
    scale = s.sqrt()
    up = u * scale
    del u
    up = (up if left is None else left.undone_columns(up)).to(dtype)
    down = scale[:, None] * vt
    del vt
    return Components(up, (down if right is None else right.undone_rows(down)).to(dtype), s.to(dtype))


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
        return (matrix @ vectors).div_(s), s, vectors.T
    return vectors, s, (vectors.T @ matrix).div_(s[:, None])


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
