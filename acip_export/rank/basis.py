"""From statistics and a basis to the factorized model and its predicted losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from acip_export.checkpoint import Checkpoint
from acip_export.factorize import Whitening, whitened_components
from acip_export.rank.config import Basis, ProgressCallback, silent
from acip_export.rank.parametrize import AdapterShape, MaskedLinear, replace_linear
from acip_export.rank.statistics import ComponentLosses, Statistics, component_losses, dense_sensitivity
from acip_export.rank.timing import Clock
from acip_export.scores import FloatArray

Whitenings = tuple[Whitening | None, Whitening | None]


@dataclass(frozen=True)
class Factorized:
    """A model whose linear layers became :class:`MaskedLinear`, with everything known about their components.

    Attributes:
        layers, losses, singular, sensitivity, whitenings: by module name; whitenings of (inputs, gradients).
    """

    layers: Mapping[str, MaskedLinear]
    losses: Mapping[str, ComponentLosses]
    singular: Mapping[str, FloatArray]
    sensitivity: Mapping[str, float]
    whitenings: Mapping[str, Whitenings]


def factorize_model(
    checkpoint: Checkpoint,
    model: nn.Module,
    statistics: Statistics,
    basis: Basis,
    mask_scale: float,
    adapter: AdapterShape,
    progress: ProgressCallback = silent,
) -> Factorized:
    """Replace every linear layer of ``model`` in place; the dense weights are released one by one."""
    layers, losses, singular, sensitivity, whitenings = {}, {}, {}, {}, {}
    roots: dict[str, Whitening] = {}

    def whitening(moment_key: str, moment: torch.Tensor, wanted: bool) -> Whitening | None:
        if wanted and moment_key not in roots:
            roots[moment_key] = Whitening.of(moment)
        return roots[moment_key] if wanted else None

    clock = Clock("components", len(checkpoint.linear_modules), 0, progress)
    for name in checkpoint.linear_modules:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)  # load_model has checked it
        inputs, gradients = statistics.input_of(name), statistics.gradient_of(name)
        whitenings[name] = (
            whitening(statistics.input_keys[name], inputs, basis in ("input", "kfac")),
            whitening(statistics.gradient_keys[name], gradients, basis == "kfac"),
        )
        weight = dense.weight.detach().cpu()
        components = whitened_components(weight, *whitenings[name])
        exact = statistics.sensitivity.get(name)
        estimate = dense_sensitivity(weight, inputs, gradients)
        losses[name] = component_losses(components, inputs, gradients, 1.0 if exact is None else exact / estimate)
        singular[name] = components.singular.numpy()
        sensitivity[name] = estimate if exact is None else exact
        layers[name] = MaskedLinear(components, dense, mask_scale, adapter)
        replace_linear(model, name, layers[name])
        clock.advance()
    return Factorized(layers, losses, singular, sensitivity, whitenings)
