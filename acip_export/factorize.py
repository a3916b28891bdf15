"""Singular components of a weight in a whitened basis. Ranking and materializing both start from here.

With H = E[x x^T] (inputs) and G = E[g g^T] (output gradients), the components are those of
svd(G^(1/2) W H^(1/2)), carried back: W = up @ down with up = G^(-1/2) U S^(1/2) and down = S^(1/2) V^T H^(-1/2).
Without G this is SVD-LLM's input whitening, without either the plain SVD. In the two-sided basis half the squared
singular value is the predicted loss of dropping the component (Kronecker-factored Fisher).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Added to the moments, as a share of their mean eigenvalue: directions that the calibration text never excited.
DAMPING = 1e-4


@dataclass(frozen=True)
class Whitening:
    """Symmetric square root of a damped second moment, and its inverse, (n, n) float64."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Whitening:
        return cls(*root_and_inverse(moment))


@dataclass(frozen=True)
class Components:
    """``weight = up @ down``, component by component.

    Attributes:
        up: (out, k) float32. down: (k, in) float32. singular: (k,) float32, descending, of the whitened weight.
    """

    up: Tensor
    down: Tensor
    singular: Tensor


def pack_moment(moment: Tensor) -> np.ndarray:
    """Upper triangle of a symmetric (n, n) matrix as float32 (n*(n+1)/2,)."""
    return moment.float().numpy()[np.triu_indices(moment.shape[0])]


def unpack_moment(triangle: np.ndarray, size: int) -> Tensor:
    """Inverse of :func:`pack_moment`; float64."""
    full = np.zeros((size, size))
    full[np.triu_indices(size)] = triangle
    return torch.from_numpy(full + np.triu(full, 1).T)


def root_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a damped second moment and its inverse, float64."""
    moment = moment.double()
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(moment.shape[0], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    roots = values.clamp_min(1e-30).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def components(weight: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> Components:
    """Factorize ``weight`` (out, in) in the basis given by the moments; ``None`` stands for the identity."""
    right = None if input_moment is None else Whitening.of(input_moment)
    left = None if gradient_moment is None else Whitening.of(gradient_moment)
    return whitened_components(weight, right, left)


def whitened_components(weight: Tensor, right: Whitening | None, left: Whitening | None) -> Components:
    """:func:`components` with the roots of the input moment (``right``) and the gradient moment (``left``) at hand."""
    whitened = weight.double()
    if left is not None:
        whitened = left.root @ whitened
    if right is not None:
        whitened = whitened @ right.root
    u, s, vt = torch.linalg.svd(whitened, full_matrices=False)
    scale = s.sqrt()
    up = u * scale
    down = scale[:, None] * vt
    return Components(
        up=(up if left is None else left.inverse @ up).float(),
        down=(down if right is None else down @ right.inverse).float(),
        singular=s.float(),
    )


def balance(
    up: Tensor, down: Tensor, right: Whitening | None, left: Whitening | None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best pair of ``rank`` for ``up @ down``, both factors with the same singular values, in the whitened norm.

    QR of both sides and one small SVD. ``up`` (out, r), ``down`` (r, in); returns float32 (out, rank), (rank, in), in
    descending order of the singular values.
    """
    left_side, right_side = up.double(), down.double()
    if left is not None:
        left_side = left.root @ left_side
    if right is not None:
        right_side = right_side @ right.root
    q_up, r_up = torch.linalg.qr(left_side)
    q_down, r_down = torch.linalg.qr(right_side.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    scale = s[:rank].sqrt()
    up = q_up @ (u[:, :rank] * scale)
    down = (scale[:, None] * vt[:rank]) @ q_down.T
    return (
        (up if left is None else left.inverse @ up).float(),
        (down if right is None else down @ right.inverse).float(),
    )


def fold(
    up: Tensor,
    down: Tensor,
    adapter_up: Tensor,
    adapter_down: Tensor,
    right: Whitening | None,
    left: Whitening | None,
) -> tuple[Tensor, Tensor]:
    """The best pair of the same rank for ``up @ down + adapter_up @ adapter_down``; see :func:`balance`."""
    return balance(torch.cat([up, adapter_up], dim=1), torch.cat([down, adapter_down]), right, left, up.shape[1])
