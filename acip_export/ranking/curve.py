"""Measure quality at every size: what the planner scales its predictions to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from acip_export.artifacts.scores import CurvePoint, FloatArray
from acip_export.lowrank.components import fold
from acip_export.lowrank.order import GlobalOrder
from acip_export.model.embedding_similarity import Similarity
from acip_export.progress import Clock
from acip_export.ranking.block_sweep import Blocks
from acip_export.ranking.context import RankContext
from acip_export.ranking.factorized_model import Factorized
from acip_export.ranking.losses import before_head, measured_next_tokens
from acip_export.ranking.masked_linear import MaskedLinear, replace_linear
from acip_export.ranking.processes import ALONE, Processes
from acip_export.ranking.sharding import whole
from acip_export.ranking.stored_tensors import StoredTensors


@torch.no_grad()
def measure_curve(
    context: RankContext, factorized: Factorized, scores: Mapping[str, FloatArray]
) -> tuple[CurvePoint, ...]:
    """Measure the held-out loss when the model's layers are cut in the global order, without and with adapters.

    The loss of a causal model is that of the next token, and its divergence from its dense self is measured beside it;
    an encoder's loss is that divergence.

    A module of shape (m, n) and rank r counts min(r*(m+n), m*n) parameters, and where its pair would be larger, it
    stays dense. Adapters are measured the way they are exported: folded into a pair at the same rank, added to a
    dense weight. Ratio 1 is the dense model. All cuts go through the model together, block by block, so that the
    factors of one block are in memory at a time.
    """
    ratios = context.calibration.curve_ratios
    context.model.eval()
    curve = _Curve(context, factorized, scores)
    for number in range(curve.passed, len(curve.blocks.names)):
        curve.pass_block(number)
    return tuple(_point(curve, place, ratio) for place, ratio in enumerate(ratios))


def _point(curve: _Curve, place: int, ratio: float) -> CurvePoint:
    plain = curve.measure(place, False)
    point = CurvePoint(ratio, plain.loss, divergence=plain.divergence)
    similarity = plain.similarity
    if curve.adapted:
        adapted = curve.measure(place, True)
        point = replace(point, loss_with_adapters=adapted.loss, divergence_with_adapters=adapted.divergence)
        similarity = adapted.similarity if point.adapters_help else similarity
    if similarity is None:
        return point
    return replace(point, spearman=similarity.spearman, similarity_error=similarity.mean_error)


@dataclass(frozen=True)
class _Measured:
    """What a cut loses: see :class:`CurvePoint`."""

    loss: float
    divergence: float | None = None
    similarity: Similarity | None = None


class _Curve:
    """Take the held-out batches through all cuts of the model."""

    def __init__(self, context: RankContext, factorized: Factorized, scores: Mapping[str, FloatArray]) -> None:
        self.context, self.factorized, self.scores = context, factorized, scores
        self.task, self.windows = context.task, context.data.held_out
        self.ratios = context.calibration.curve_ratios
        self.order = GlobalOrder(scores, dict(context.checkpoint.linear_modules))
        # Encoders compare outputs of texts with each other; windows too few to share are everybody's.
        alone = not self.task.labelled or len(self.windows) < context.processes.count
        self.processes = ALONE if alone else context.processes
        device = context.processes.device
        self.batches = [
            self.task.trimmed(part.to(device)) for _, part in self.processes.batches(self.windows, context.batch)
        ]
        self.adapted = any(factorized.adapter.rank_for(*shape) for shape in context.checkpoint.linear_modules.values())
        self.variants = [
            (place, adapted) for place in range(len(self.ratios)) for adapted in (False, True)[: 1 + self.adapted]
        ]
        self.blocks = Blocks(context)
        self.entered = [self.blocks.enter(part) for part in self.batches]
        self.states = StoredTensors(context.work.scratch("curve"))
        self.dense: list[Tensor] = []
        # Of other scores and adapters, as learning may end with, it is another curve.
        self._name = f"curve {self._digest()}"
        self.passed = sum(self._step(number) in context.work for number in range(len(self.blocks.names)))
        steps = len(self.variants) * (len(self.blocks.names) + 1)
        tokens = self.windows.numel() / (len(self.blocks.names) + 1)
        done = self.passed * len(self.variants)
        self.clock = Clock("curve", steps, context.progress, tokens=tokens, done=done)

    def pass_block(self, number: int) -> None:
        """Compute a block of every cut."""
        model, names = self.context.model, self.blocks.members[self.blocks.names[number]]
        dense = {} if self.factorized.whole else {name: model.get_submodule(name) for name in names}
        with self.blocks.weights(number), self.factorized.of_block(names) as layers:
            for name, layer in layers.items():
                order = np.argsort(-self.scores[name], kind="stable")
                layer.arrange(torch.from_numpy(order).to(layer.mask.device), len(layer.mask))
                layer.gated = False
            for place, adapted in self.variants:
                ranks = self.order.ranks_at(self.ratios[place])
                for name, layer in layers.items():
                    stays = self.order.stays_dense(name, ranks[name])
                    layer.live = len(layer.mask) if stays else ranks[name]
                    layer.adapted = False
                    if not self.factorized.whole:
                        replace_linear(model, name, dense[name] if stays else layer)
                if adapted:
                    _fold_adapters(self.factorized, layers, self.context.processes)
                for index, (entered, arguments) in enumerate(self.entered):
                    cut = f"{place}/{adapted}/{index}"
                    hidden = self.states[cut].to(self.batches[index].device) if number else entered
                    self.states[cut] = self.blocks.run(number, hidden, arguments)
                if adapted:
                    for layer in layers.values():
                        layer.release()
                self.clock.advance()
        self.context.work.finish(self._step(number))

    def _step(self, number: int) -> str:
        return f"{self._name} {self.blocks.names[number]}"

    def _digest(self) -> str:
        digest = hashlib.sha256(self.windows.numpy().data)
        for name, layer_scores in self.scores.items():
            digest.update(name.encode() + np.ascontiguousarray(layer_scores).tobytes())
            if self.adapted:
                for factor in adapter_pair(self.factorized.layers[name]):
                    digest.update(factor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def measure(self, place: int, adapted: bool) -> _Measured:
        """Return what a cut loses that has passed all blocks.

        Of an encoder the first one that is measured has to be the dense one.
        """
        found = self._tokens(place, adapted) if self.task.labelled else self._outputs(place, adapted)
        self.clock.advance(ratio=self.ratios[place], loss=found.loss)
        return found

    def _tokens(self, place: int, adapted: bool) -> _Measured:
        model, total = self.context.model, torch.zeros(2, dtype=torch.float64)
        for index, part in enumerate(self.batches):
            # The dense model is the first cut.
            with self.blocks.left(self.states[f"0/False/{index}"].to(part.device)):
                dense = before_head(model, part)
            with self.blocks.left(self.states[f"{place}/{adapted}/{index}"].to(part.device)):
                figures = measured_next_tokens(model, part, before_head(model, part), dense)
            total += len(part) * torch.tensor(figures, dtype=torch.float64)
        loss, divergence = (self.processes.sum(total) / len(self.windows)).tolist()
        # What is no number stays that: the order of the two matters.
        return _Measured(loss, max(divergence, 0.0))

    def _outputs(self, place: int, adapted: bool) -> _Measured:
        task, outputs = self.task, []
        for index, part in enumerate(self.batches):
            with self.blocks.left(self.states[f"{place}/{adapted}/{index}"].to(part.device)):
                outputs.append(task.outputs(self.context.model, part))
        self.dense = self.dense or outputs
        total = sum(task.divergence(o, d).item() for o, d in zip(outputs, self.dense, strict=True))
        # The divergence of a model from itself is zero up to rounding, which is of no sign.
        loss = max(total / sum(task.counted(part) for part in self.batches), 0.0)
        return _Measured(loss, similarity=task.similarity(torch.cat(outputs), torch.cat(self.dense)))


def adapter_pair(layer: MaskedLinear) -> tuple[Tensor, Tensor]:
    """Return ``(b, a)`` of a layer's whole adapter, float32, with LoRA's scale folded into ``b``."""
    return layer.adapter_scale * layer.adapter_b.detach(), layer.adapter_a.detach()


def _fold_adapters(factorized: Factorized, layers: Mapping[str, MaskedLinear], processes: Processes) -> None:
    for name, layer in layers.items():
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
