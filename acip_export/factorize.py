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
    whitened = weight.double()
    left = right = None
    if gradient_moment is not None:
        root, left = root_and_inverse(gradient_moment)
        whitened = root @ whitened
    if input_moment is not None:
        root, right = root_and_inverse(input_moment)
        whitened = whitened @ root
    u, s, vt = torch.linalg.svd(whitened, full_matrices=False)
    scale = s.sqrt()
    up = u * scale
    down = scale[:, None] * vt
    return Components(
        up=(up if left is None else left @ up).float(),
        down=(down if right is None else down @ right).float(),
        singular=s.float(),
    )
