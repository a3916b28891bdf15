"""Predicted loss, in one unit for everything: nats per token above the dense model, to second order.

With H = E[x x^T] and G = E[g g^T], a change dW costs 1/2 tr(G dW H dW^T). The score file holds that number for each
dropped component, and for rounding each weight or factor with a relative mean square error of one; formats.py has the
error of each format. The sum over a plan is then scaled to the curve that was measured when the model was ranked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acip_export.scores import ScoreFile

FloatArray = npt.NDArray[np.float64]


def component_losses(scores: ScoreFile) -> dict[str, FloatArray]:
    """Loss of dropping each component, made consistent with the global order.

    The second-order estimate knows the size of things, the learned order knows their sequence: the least-squares
    non-decreasing fit of the estimates along the order has both. Where the order came from the estimates it changes
    nothing.
    """
    from scipy.optimize import isotonic_regression

    order = scores.global_order
    estimates = np.concatenate([scores.modules[name].drop_loss for name in order.names]).astype(np.float64)
    losses = np.empty_like(estimates)
    losses[order.positions] = isotonic_regression(estimates[order.positions]).x
    return dict(zip(order.names, np.split(losses, np.cumsum(order.counts)[:-1]), strict=True))


@dataclass(frozen=True)
class Calibration:
    """Monotone map from summed estimates to measured loss, from the score file's curve.

    Attributes:
        estimated, measured: (n,) both start at 0 and never fall. adapters_help: (n,) whether the adapters lowered the
            loss at that point.
        dense_loss: nats per token of the dense model, on the curve's text.
    """

    estimated: FloatArray
    measured: FloatArray
    adapters_help: tuple[bool, ...]
    dense_loss: float

    def loss(self, estimate: float) -> float:
        """Between points linear; beyond the last, on along the last segment."""
        if len(self.estimated) < 2:
            return estimate
        if estimate <= self.estimated[-1]:
            return float(np.interp(estimate, self.estimated, self.measured))
        rise = self.measured[-1] - self.measured[-2]
        run = self.estimated[-1] - self.estimated[-2]
        return float(self.measured[-1] + (estimate - self.estimated[-1]) * rise / run)

    def adapters(self, estimate: float) -> bool:
        """Whether the adapters helped at the measured point closest to ``estimate``."""
        return self.adapters_help[int(np.argmin(np.abs(self.estimated - estimate)))]


def calibrate(scores: ScoreFile, losses: dict[str, FloatArray]) -> Calibration:
    """Estimate every cut of the measured curve and pair it with what was measured."""
    dense = scores.curve[0].loss
    points: list[tuple[float, float, bool]] = [(0.0, 0.0, False)]
    for point in scores.curve[1:]:
        estimate = 0.0
        for name, rank in scores.ranks_at(point.ratio).items():
            module = scores.modules[name]
            if rank * sum(module.shape) < module.shape[0] * module.shape[1]:
                estimate += float(losses[name][module.order[rank:]].sum())
        with_adapters = point.loss if point.loss_with_adapters is None else point.loss_with_adapters
        points.append((estimate, min(point.loss, with_adapters) - dense, with_adapters < point.loss))
    points.sort()
    kept: list[tuple[float, float, bool]] = []
    for estimate, measured, helps in points:
        if not kept or estimate > kept[-1][0]:
            kept.append((estimate, max(measured, kept[-1][1] if kept else 0.0), helps))
    return Calibration(np.array([k[0] for k in kept]), np.array([k[1] for k in kept]), tuple(k[2] for k in kept), dense)
