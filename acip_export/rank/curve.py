"""Measured quality at every size: what the planner scales its predictions to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from acip_export.factorize import Whitening, fold
from acip_export.rank.config import CURVE_RATIOS, ProgressCallback, silent
from acip_export.rank.objectives import next_token_loss
from acip_export.rank.ordering import GlobalOrder
from acip_export.rank.parametrize import MaskedLinear
from acip_export.rank.timing import Clock
from acip_export.scores import CurvePoint, FloatArray


def measure_curve(
    model: nn.Module,
    layers: Mapping[str, MaskedLinear],
    scores: Mapping[str, FloatArray],
    whitenings: Mapping[str, tuple[Whitening | None, Whitening | None]],
    windows: Tensor,
    batch: int,
    ratios: tuple[float, ...] = CURVE_RATIOS,
    progress: ProgressCallback = silent,
) -> tuple[CurvePoint, ...]:
    """Loss on ``windows`` (n, context) when the layers are cut in the global order, without and with adapters.

    A module of shape (m, n) and rank r counts min(r*(m+n), m*n) parameters, and where its pair would be larger, it
    stays dense. Adapters are measured the way they are exported: folded into a pair at the same rank, added to a
    dense weight. Ratio 1 is the dense model.


    Args:
        whitenings: of the inputs and the gradients, by module; ``None`` for the identity.
    """
    model.eval()
    order = GlobalOrder(scores, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    for name, layer in layers.items():
        layer.arrange(torch.from_numpy(np.argsort(-scores[name], kind="stable")).to(layer.mask.device), len(layer.mask))
        layer.gated = False
    adapted = any(len(layer.adapter_a) for layer in layers.values())
    clock = Clock("curve", len(ratios) * (1 + adapted), windows.numel(), progress)
    points = []
    for ratio in ratios:
        ranks = order.ranks_at(ratio)
        for name, layer in layers.items():
            layer.live = len(layer.mask) if order.stays_dense(name, ranks[name]) else ranks[name]
            layer.adapted, layer.folded = False, None
        loss = held_out_loss(model, windows, batch)
        clock.advance(ratio=ratio, loss=loss)
        with_adapters = None
        if adapted:
            for name, layer in layers.items():
                if layer.live == len(layer.mask):
                    layer.adapted = len(layer.adapter_a) > 0
                else:
                    layer.folded = _folded(layer, *whitenings[name])
            with_adapters = held_out_loss(model, windows, batch)
            clock.advance(ratio=ratio, loss=with_adapters)
        points.append(CurvePoint(ratio, loss, with_adapters))
    for layer in layers.values():
        layer.folded = None
    return tuple(points)


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Mean negative log-likelihood, nats per token."""
    device = next(model.parameters()).device
    total = 0.0
    for part in windows.split(batch):  # type: ignore[no-untyped-call]
        total += next_token_loss(model, part.to(device)).item() * len(part)
    return total / len(windows)


def adapter_pair(layer: MaskedLinear) -> tuple[Tensor, Tensor]:
    """``(b, a)`` of a layer's adapter, float32, with the scale folded into ``b``."""
    return layer.adapter_scale * layer.adapter_b.detach(), layer.adapter_a.detach()


def _folded(layer: MaskedLinear, right: Whitening | None, left: Whitening | None) -> tuple[Tensor, Tensor]:
    b, a = adapter_pair(layer)
    up, down = layer.up[:, : layer.live], layer.down[: layer.live]
    device, dtype = up.device, up.dtype
    pair = fold(up.cpu(), down.cpu(), b.cpu(), a.cpu(), right, left)
    return pair[0].to(device, dtype), pair[1].to(device, dtype)
