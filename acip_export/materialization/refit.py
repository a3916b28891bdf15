"""Factor pairs that survive quantization: the freedom within ``up @ down`` is spent on the rounding error.

Any invertible R gives the same product (up R^-1)(R down). Three steps use that; benchmarks/refit.json has the gain of
each:

1. Balance: both factors get the same share of every singular value, in the norm of the predicted loss.
2. Rotate the rank dimension. Rounding costs the sum over components of the products of the factors' energies; spread
   evenly that is (sum s)^2 / r instead of sum s^2, and blocks hold no outliers.
3. Alternate: quantize ``down``, refit ``up`` to what it became by weighted least squares, quantize ``up``, refit
   ``down``, and so on. The pair with the least predicted loss after quantizing both is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from acip_export.lowrank.components import balance
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization.factors import Norm, Pair, inner_importance
from acip_export.rounding.quantizer import InputMoments, RoundTrip
from acip_export.weight_types import WeightType

# The first refit brings most of the gain; after the third the loss changes by a few percent, in either direction.
ROUNDS = 3
# Added to the normal equations, as a share of their mean diagonal: a rounded factor may have rows of zeros.
_RIDGE = 1e-8


@dataclass(frozen=True)
class Refitted:
    """A pair to be quantized.

    Attributes:
        pair: what the quantizer is given. loss: predicted loss of rounding both, against the pair that came in.
        up_importance: (rank,) float32, which the quantizer of ``up`` is to be given.
    """

    pair: Pair
    loss: float
    up_importance: Tensor


def balanced(pair: Pair, norm: Norm) -> Pair:
    """The same product with equal singular values in both factors, in the norm of the predicted loss."""
    return Pair(*balance(pair.up, pair.down, Whitening.of(norm.inputs), Whitening.of(norm.gradients)))


def refit(
    pair: Pair,
    norm: Norm,
    inputs: InputMoments,
    up_type: WeightType,
    down_type: WeightType,
    round_trip: RoundTrip,
    rounds: int = ROUNDS,
    rotate: bool = True,
) -> Refitted:
    """The pair to quantize in place of ``pair``: same shapes, nearly the same product.

    Rounding ``down`` with ``inputs`` and ``up`` with :attr:`Refitted.up_importance` gives the very numbers that
    were found best here.

    Args:
        pair: balanced, see :func:`balanced`. inputs: what ``down`` is rounded with.
        rounds: refits of ``up``; 0 quantizes the factors as they are. rotate: without it the pair is taken as it comes.

    Raises:
        As ``round_trip``.
    """
    rank = len(pair.down)
    up, down = pair.up, pair.down
    if rotate:
        rotation = _rotation(rank)
        up, down = up @ rotation.T, rotation @ down
    best: Refitted | None = None
    for index in range(max(1, rounds)):
        rounded_down = round_trip(down, down_type.name, inputs)
        up_importance = inner_importance(rounded_down, norm.inputs)
        if rounds:
            up = _fit_up(pair, rounded_down, norm.inputs)
        rounded_up = round_trip(up, up_type.name, InputMoments(up_importance))
        loss = _difference(pair, Pair(rounded_up, rounded_down), norm)
        if best is None or loss < best.loss:
            best = Refitted(Pair(up, down), loss, up_importance)
        if index + 1 < rounds:
            down = _fit_down(pair, rounded_up, norm.gradients)
    assert best is not None
    return best


def _fit_up(target: Pair, down: Tensor, inputs: Tensor) -> Tensor:
    """argmin over up of tr((T - up down) H (T - up down)^T), (out, rank) float32."""
    wide = down.double()
    weighted = wide @ inputs
    cross = target.up.double() @ (target.down.double() @ weighted.T)
    return _solve(weighted @ wide.T, cross.T).T.float()


def _fit_down(target: Pair, up: Tensor, gradients: Tensor) -> Tensor:
    """argmin over down of tr((T - up down)^T G (T - up down)), (rank, in) float32."""
    tall = up.double()
    weighted = tall.T @ gradients
    cross = (weighted @ target.up.double()) @ target.down.double()
    return _solve(weighted @ tall, cross).float()


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    solution: Tensor = torch.linalg.solve(matrix + _RIDGE * mean * torch.eye(len(matrix), dtype=torch.float64), right)
    return solution


def _difference(a: Pair, b: Pair, norm: Norm) -> float:
    """Predicted loss of replacing one product by the other, from (2r, 2r) matrices."""
    up = torch.cat([b.up, -a.up], dim=1).double()
    down = torch.cat([b.down, a.down]).double()
    return 0.5 * float(((up.T @ norm.gradients @ up) * (down @ norm.inputs @ down.T)).sum())


@cache
def _rotation(size: int) -> Tensor:
    """An orthogonal matrix whose entries are all of about the same size, (size, size) float32.

    The discrete cosine transform exists in every size; shuffled columns and random signs keep it from resonating with
    the smooth decay of the singular values.
    """
    generator = np.random.default_rng(0)
    place, time = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * (2 * time + 1) * place / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    shuffled = matrix[:, generator.permutation(size)] * generator.choice([-1.0, 1.0], size)
    return torch.from_numpy(shuffled.astype(np.float32))
