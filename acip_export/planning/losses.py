"""Predicted loss, in one unit for everything: nats per token above the dense model, to second order.

With H = E[x x^T] and G = E[g g^T], a change dW costs 1/2 tr(G dW H dW^T). The score file holds that number for each
dropped component, scaled here to the curve that was measured when the model was ranked, and for rounding each weight
or factor with a relative mean square error of one; what the types' errors are was measured on the model
(:mod:`acip_export.artifacts.rounding_errors`). A plan's predicted loss is the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.scores import ScoreFile

# Bounds on measured over estimated loss: near the dense model both are small, and their quotient is noise.
_FACTORS = (0.25, 8.0)

FloatArray = npt.NDArray[np.float64]


def component_losses(scores: ScoreFile) -> dict[str, FloatArray]:
    """Return the loss of dropping each component, consistent with the global order and scaled to the measured curve.

    The second-order estimate knows the size of things, the learned order knows their sequence: the least-squares
    non-decreasing fit of the estimates along the order has both. Where the order came from the estimates it changes
    nothing. Then the components that one step of the curve drops are scaled to add up to what that step was measured to
    cost: dropping is systematic and costs up to twice its estimate, rounding is noise and costs just about its own
    (benchmarks/predict.json), so only the losses of dropping are scaled.
    """
    dense = scores.curve[0]
    return _scaled(scores, _along_order(scores), [point.above(dense) for point in scores.curve[1:]])


def component_divergences(scores: ScoreFile) -> dict[str, FloatArray] | None:
    """Return the same of the divergence from the dense model, nats per token; ``None``: it was not measured.

    Adapters learn the text that they are trained on, so that the loss of a cut grows less than its divergence. Losses
    of encoders are divergences.
    """
    measured = [point.divergence_as_cut for point in scores.curve[1:]]
    known = [divergence for divergence in measured if divergence is not None]
    return _scaled(scores, _along_order(scores), known) if measured and len(known) == len(measured) else None


def _along_order(scores: ScoreFile) -> dict[str, FloatArray]:
    order = scores.global_order
    estimates = np.concatenate([scores.modules[name].drop_loss for name in order.names]).astype(np.float64)
    losses = np.empty_like(estimates)
    losses[order.positions] = isotonic(estimates[order.positions])
    return dict(zip(order.names, np.split(losses, np.cumsum(order.counts)[:-1]), strict=True))


def isotonic(values: FloatArray) -> FloatArray:
    """Fit non-decreasing values by least squares: neighbouring blocks that fall are pooled until none does (Ayer 1955).

    Whole runs are pooled at a time, as most of a million components are in order already.
    """
    mean, weight = values, np.ones(len(values))
    while True:
        # A block joins the one before it where it is not above it.
        starts = np.flatnonzero(np.r_[True, mean[1:] > mean[:-1]])
        if len(starts) == len(mean):
            return np.repeat(mean, weight.astype(np.int64))
        total = np.add.reduceat(weight, starts)
        mean, weight = np.add.reduceat(mean * weight, starts) / total, total


def _scaled(scores: ScoreFile, losses: dict[str, FloatArray], measured: Sequence[float]) -> dict[str, FloatArray]:
    """Scale each component's loss by (measured / estimated) of the step of the curve that drops it first.

    What the bounds on that leave out, the next step makes up for.

    Args:
        measured: above the dense model, of every point of the curve but the first.
    """
    scaled = {name: values.copy() for name, values in losses.items()}
    dropped = {name: np.zeros(len(values), bool) for name, values in losses.items()}
    scaled_so_far, factor = 0.0, 1.0
    for point, above in zip(scores.curve[1:], measured, strict=True):
        new: dict[str, npt.NDArray[np.int64]] = {}
        for name, components in _dropped_at(scores, point.ratio):
            new[name] = components[~dropped[name][components]]
            dropped[name][components] = True
        estimate = sum(float(losses[name][components].sum()) for name, components in new.items())
        if estimate > 0:
            factor = float(np.clip((above - scaled_so_far) / estimate, *_FACTORS))
        for name, components in new.items():
            scaled[name][components] *= factor
        scaled_so_far += factor * estimate
    for name, done in dropped.items():
        scaled[name][~done] *= factor
    return scaled


def _dropped_at(scores: ScoreFile, ratio: float) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield the components that a cut of the curve drops: none where the pair would be larger than the weight."""
    for name, rank in scores.ranks_at(ratio).items():
        module = scores.modules[name]
        if rank * sum(module.shape) < module.shape[0] * module.shape[1]:
            yield name, module.order[rank:]


@dataclass(frozen=True)
class MeasuredCuts:
    """What the ranking measured at its cuts.

    Attributes:
        estimated: (n,) summed losses of the components that a cut drops, growing.
        adapters_help: (n,) whether the adapters lowered the loss there.
        dense_loss: nats per token of the dense model, on the curve's text.
    """

    estimated: FloatArray
    adapters_help: tuple[bool, ...]
    dense_loss: float

    def adapters(self, estimate: float) -> bool:
        """Return whether the adapters helped at the measured cut closest to ``estimate``."""
        return self.adapters_help[int(np.argmin(np.abs(self.estimated - estimate)))]


def measured_cuts(scores: ScoreFile, losses: dict[str, FloatArray]) -> MeasuredCuts:
    """Estimate every cut of the measured curve and pair it with what was measured."""
    points = [(0.0, False)]
    for point in scores.curve[1:]:
        dropped = _dropped_at(scores, point.ratio)
        estimate = sum(float(losses[name][components].sum()) for name, components in dropped)
        points.append((estimate, point.adapters_help))
    points.sort()
    return MeasuredCuts(
        np.array([estimate for estimate, _ in points]), tuple(h for _, h in points), scores.curve[0].loss
    )
