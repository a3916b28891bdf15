"""What rounding costs a model, measured by forward passes: the cache beside a score file. See docs/measured-losses.md.

Rounding errors (:mod:`acip_export.artifacts.rounding_errors`) predict the loss of rounding one matrix to second order,
which gets types right, and layers and classes of layers wrong: a few layers lose many times of it. So each layer is
rounded alone, and then each class, and the divergence from the dense model measured; predictions are scaled by the
quotients. What the runtime loses by rounding what the matrices are multiplied with is measured beside it, and added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, log
from pathlib import Path
from typing import ClassVar

import numpy as np

from acip_export.artifacts.cache import FormatCache, load_cache
from acip_export.artifacts.names import MEASURED_LOSSES, ArtifactName
from acip_export.artifacts.rounding_errors import Ratios, RoundingErrors
from acip_export.io.atomic import keep
from acip_export.io.inputs import Count, NotNegative
from acip_export.model.tensor_names import class_of
from acip_export.rounding.quantizer import Rounding
from acip_export.weight_types import weight_type

# Losses below this are the noise of float32, nats per token.
_NOISE = 1e-7
# Measured over predicted: beyond these a file was not made by measuring.
_LEAST_FACTOR, _LARGEST_FACTOR = 1e-4, 1e4
# The same of a layer, over that of its class: one that loses nothing still has a share of it.
_LEAST_SHARE, _LARGEST_SHARE = 1e-2, 1e2


@dataclass(frozen=True)
class MeasuredLoss:
    """The matrices of one class in one type, some of very large ones, or one of them, all else dense; nats per token.

    Attributes:
        predicted: the sum of their rounding errors. measured: divergence from the dense model. error: its standard
            error.
    """

    predicted: NotNegative
    measured: NotNegative
    error: NotNegative


@dataclass(frozen=True)
class MeasuredLosses(FormatCache):
    """Measured losses for one score file and one format.

    Attributes:
        text_sha256: of the text that classes were measured on, and ``tokens`` how much of it.
        classes: by class of layers (``mlp.up_proj``; an embedding or head by its name) and type.
        inputs: the same, with the matrices' inputs rounded too, as runtimes do on processors.
        layers: by tensor and the one type that it was measured in.
    """

    NAME: ClassVar[ArtifactName] = MEASURED_LOSSES

    text_sha256: str = ""
    tokens: Count = 0
    classes: Mapping[str, Mapping[str, MeasuredLoss]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, MeasuredLoss]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, MeasuredLoss]] = field(default_factory=dict)

    def by_class(self, inputs: bool) -> Mapping[str, Mapping[str, MeasuredLoss]]:
        """Return what was measured with or without rounded inputs."""
        return self.inputs if inputs else self.classes

    def with_loss(self, name: str, type_: str, inputs: bool, loss: MeasuredLoss) -> MeasuredLosses:
        """Return these losses and another."""
        known = self.by_class(inputs)
        more = {**known, name: {**known.get(name, {}), type_: loss}}
        return replace(self, inputs=more) if inputs else replace(self, classes=more)

    def with_layers(self, layers: Mapping[str, Mapping[str, MeasuredLoss]]) -> MeasuredLosses:
        """Return these losses with more layers; their classes are to be measured on top of them again."""
        changed = {class_of(name) for name in layers}
        classes, inputs = (
            {name: losses for name, losses in known.items() if name not in changed}
            for known in (self.classes, self.inputs)
        )
        return replace(self, layers={**self.layers, **layers}, classes=classes, inputs=inputs)

    def by_layers(self, errors: RoundingErrors) -> RoundingErrors:
        """Return ``errors`` shared among the layers of each class as they were measured to lose.

        What the measured layers of a class lose together, in the type that they were measured in, stays, unless the
        share of one is cut.
        """
        shares = self._shares()
        return replace(
            errors,
            dense={
                name: {type_: loss * shares.get(name, 1.0) for type_, loss in losses.items()}
                for name, losses in errors.dense.items()
            },
            pairs={
                name: {
                    # A correction's ratio is to the loss of its base, which has it already.
                    types: points if types.endswith("+") else _scaled(points, shares.get(f"{name}.weight", 1.0))
                    for types, points in measured.items()
                }
                for name, measured in errors.pairs.items()
            },
        )

    def _shares(self) -> dict[str, float]:
        """Return by layer how measured over predicted compares with that of its class."""
        known = {name: loss for name, losses in self.layers.items() for loss in losses.values() if loss.predicted > 0}
        sums: dict[str, list[float]] = {}
        for name, loss in known.items():
            of_class = sums.setdefault(class_of(name), [0.0, 0.0])
            of_class[0] += loss.predicted
            of_class[1] += _at_least(loss)
        return {
            name: min(max(_at_least(loss) / loss.predicted * predicted / measured, _LEAST_SHARE), _LARGEST_SHARE)
            for name, loss in known.items()
            for predicted, measured in (sums[class_of(name)],)
        }

    def calibrated(self, errors: RoundingErrors) -> RoundingErrors:
        """Return ``errors`` with the losses of each class and type scaled to what was measured.

        Layers share them as :meth:`by_layers` says. Between measured types the factor is interpolated in the logarithms
        of factor and predicted loss; beyond them it stays. A pair is scaled as a matrix of the type of its ``down``;
        corrections follow their bases. Rounding inputs costs layers in proportion to what rounding their weights does.
        """
        errors = self.by_layers(errors)
        sums = class_losses(errors)
        factors = {
            name: _factors(self.classes[name], predicted) for name, predicted in sums.items() if name in self.classes
        }
        inputs = {
            name: _input_losses(errors.format, measured, factors.get(name, {}), sums.get(name, {}))
            for name, measured in self.inputs.items()
        }
        dense = {
            name: {type_: loss * factors.get(class_of(name), {}).get(type_, 1.0) for type_, loss in losses.items()}
            for name, losses in errors.dense.items()
        }
        pairs = {
            name: {
                types: _scaled(points, _of_pair(factors.get(class_of(name), {}), types))
                for types, points in measured.items()
            }
            for name, measured in errors.pairs.items()
        }
        of_inputs = {
            name: {
                type_: whole * share
                for type_, (like, whole) in inputs.get(class_of(name), {}).items()
                if type_ in losses and like in losses and (share := losses[like] / sums[class_of(name)][like]) > 0
            }
            for name, losses in errors.dense.items()
        }
        return replace(errors, dense=dense, pairs=pairs, inputs=of_inputs)


def class_losses(errors: RoundingErrors) -> dict[str, dict[str, float]]:
    """Return the predicted loss of rounding all matrices of a class, by class and type."""
    sums: dict[str, dict[str, float]] = {}
    for name, losses in errors.dense.items():
        of_class = sums.setdefault(class_of(name), {})
        for type_, loss in losses.items():
            of_class[type_] = of_class.get(type_, 0.0) + loss
    return sums


def _factors(measured: Mapping[str, MeasuredLoss], predicted: Mapping[str, float]) -> dict[str, float]:
    points = sorted(
        (log(predicted[type_]), log(min(max(each.measured / each.predicted, _LEAST_FACTOR), _LARGEST_FACTOR)))
        for type_, each in measured.items()
        if each.predicted > _NOISE and predicted.get(type_, 0.0) > _NOISE
    )
    if not points:
        return {}
    places = [log(max(loss, _NOISE)) for loss in predicted.values()]
    logs = np.interp(places, [place for place, _ in points], [factor for _, factor in points])
    return {type_: exp(value) for type_, value in zip(predicted, logs, strict=True)}


def _input_losses(
    fmt: str, measured: Mapping[str, MeasuredLoss], factors: Mapping[str, float], predicted: Mapping[str, float]
) -> dict[str, tuple[str, float]]:
    """Return what a class loses by rounding its inputs, by type, and the measured type that layers share it as.

    Linear in the logarithm of the block between measured blocks. What some layers lose is a share of it.
    """

    def whole(type_: str, loss: MeasuredLoss) -> float:
        scale = predicted[type_] / loss.predicted if predicted.get(type_) and loss.predicted else 1.0
        return scale * max(0.0, loss.measured - loss.predicted * factors.get(type_, 1.0))

    points = sorted(
        (weight_type(fmt, type_).input_block, type_, whole(type_, loss)) for type_, loss in measured.items()
    )
    points = [point for point in points if point[0]]
    blocks = {type_: weight_type(fmt, type_).input_block for type_ in predicted}
    places, losses = [log(block) for block, _, _ in points], [loss for _, _, loss in points]
    return {
        type_: (points[0][1], float(np.interp(log(block), places, losses)))
        for type_, block in blocks.items()
        if block and points
    }


def _at_least(loss: MeasuredLoss) -> float:
    """Return what was measured; where that is noise, as much as the noise."""
    return max(loss.measured, loss.error, _NOISE)


def _scaled(points: Ratios, factor: float) -> Ratios:
    return tuple((rank, ratio * factor) for rank, ratio in points)


def _of_pair(factors: Mapping[str, float], types: str) -> float:
    return factors.get(types.partition("*")[0], 1.0)


def cache_file(scores: Path, fmt: str, rounding: Rounding) -> Path:
    """``llama.acip`` -> ``llama.acip.losses-gguf.json``, or ``….losses-gguf-feedback.json``."""
    way = "" if rounding == "nearest" else f"-{rounding}"
    return scores.with_name(f"{scores.name}.losses-{fmt}{way}.json")


def load_measured_losses(file: Path, nothing: MeasuredLosses) -> MeasuredLosses:
    """Return what the cache knows; ``nothing`` where it is of another format, quantizer, score file or version."""
    return load_cache(file, nothing)


def save_measured_losses(losses: MeasuredLosses, file: Path) -> None:
    """Write atomically, replacing what is there; a directory that cannot be written to is no error."""
    keep(file, (json.dumps(losses.to_json(), indent=1) + "\n").encode(), "losses are measured")
