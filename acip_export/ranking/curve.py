"""Measure quality at every size: what the planner scales its predictions to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from acip_export.artifacts.scores import CurvePoint, FloatArray
from acip_export.lowrank.components import fold
from acip_export.lowrank.order import GlobalOrder
from acip_export.model.embedding_similarity import Similarity
from acip_export.progress import Clock
from acip_export.ranking.context import RankContext
from acip_export.ranking.factorized_model import Factorized
from acip_export.ranking.losses import next_token_loss
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.processes import ALONE, Processes
from acip_export.ranking.sharding import whole
from acip_export.ranking.tasks import Task


def measure_curve(
    context: RankContext, factorized: Factorized, scores: Mapping[str, FloatArray]
) -> tuple[CurvePoint, ...]:
    """Measure the held-out loss when the model's layers are cut in the global order, without and with adapters.

    The loss of a causal model is that of the next token, an encoder's the divergence from its dense self.

    A module of shape (m, n) and rank r counts min(r*(m+n), m*n) parameters, and where its pair would be larger, it
    stays dense. Adapters are measured the way they are exported: folded into a pair at the same rank, added to a
    dense weight. Ratio 1 is the dense model.
    """
    model, task, processes, batch = context.model, context.task, context.processes, context.batch
    windows, ratios = context.data.held_out, context.calibration.curve_ratios
    model.eval()
    layers = factorized.layers
    order = GlobalOrder(scores, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    for name, layer in layers.items():
        layer.arrange(torch.from_numpy(np.argsort(-scores[name], kind="stable")).to(layer.mask.device), len(layer.mask))
        layer.gated = False
    adapted = any(len(layer.adapter_a) for layer in layers.values())
    with dense_behaviour(layers):
        dense = None if task.labelled else [o for _, o in _outputs(task, model, windows, batch)]

    def measure() -> tuple[float, Similarity | None]:
        if dense is None:
            return held_out_loss(model, windows, batch, processes), None
        return held_out_divergence(task, model, windows, batch, dense)

    clock = Clock("curve", len(ratios) * (1 + adapted), context.progress, tokens=windows.numel())
    points = []
    for ratio in ratios:
        ranks = order.ranks_at(ratio)
        for name, layer in layers.items():
            layer.live = len(layer.mask) if order.stays_dense(name, ranks[name]) else ranks[name]
            layer.adapted = False
        loss, similarity = measure()
        clock.advance(ratio=ratio, loss=loss)
        with_adapters = None
        if adapted:
            _fold_adapters(factorized, processes)
            with_adapters, adapted_similarity = measure()
            if with_adapters < loss:
                similarity = adapted_similarity
            for layer in layers.values():
                layer.release()
            clock.advance(ratio=ratio, loss=with_adapters)
        kept = (None, None) if similarity is None else (similarity.spearman, similarity.mean_error)
        points.append(CurvePoint(ratio, loss, with_adapters, *kept))
    return tuple(points)


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int, processes: Processes = ALONE) -> float:
    """Measure the mean negative log-likelihood, nats per token."""
    if len(windows) < processes.count:
        processes = ALONE  # too few to share: all measure all of them
    device = next(model.parameters()).device
    total = 0.0
    for _, part in processes.batches(windows, batch):
        total += next_token_loss(model, part.to(device)).item() * len(part)
    return float(processes.sum(torch.tensor(total, dtype=torch.float64))) / len(windows)


@torch.no_grad()
def held_out_divergence(
    task: Task, model: nn.Module, windows: Tensor, batch: int, dense: list[Tensor]
) -> tuple[float, Similarity | None]:
    """Measure the mean divergence of an encoder from its ``dense`` outputs (by batch), in the task's unit; and for
    sentence embeddings how well their similarities are kept.
    """
    outputs = list(_outputs(task, model, windows, batch))
    total = sum(task.divergence(o, d).item() for (_, o), d in zip(outputs, dense, strict=True))
    # The divergence of a model from itself is zero up to rounding, which is of no sign.
    loss = max(0.0, total / sum(task.counted(part) for part, _ in outputs))
    return loss, task.similarity(torch.cat([o for _, o in outputs]), torch.cat(dense))


@torch.no_grad()
def _outputs(task: Task, model: nn.Module, windows: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for part in windows.split(batch):  # type: ignore[no-untyped-call]
        trimmed = task.trimmed(part.to(device))
        yield trimmed, task.outputs(model, trimmed)


def adapter_pair(layer: MaskedLinear) -> tuple[Tensor, Tensor]:
    """Return ``(b, a)`` of a layer's whole adapter, float32, with LoRA's scale folded into ``b``."""
    return layer.adapter_scale * layer.adapter_b.detach(), layer.adapter_a.detach()


def _fold_adapters(factorized: Factorized, processes: Processes) -> None:
    for name, layer in factorized.layers.items():
        if layer.live == len(layer.mask):
            layer.adapted = len(layer.adapter_a) > 0
            continue
        pair = whole(layer.up)[:, : layer.live], whole(layer.down)[: layer.live]
        if factorized.owners[name] == processes.index:
            b, a = adapter_pair(layer)
            b = layer.adapter_share() * b.cpu()
            folded = fold(pair[0].cpu(), pair[1].cpu(), b, a.cpu(), *factorized.whitenings(name))
            pair = folded[0].to(pair[0]), folded[1].to(pair[1])
        layer.hold(*(processes.from_owner(factor, factorized.owners[name]) for factor in pair))
