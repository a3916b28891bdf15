"""From statistics and a basis to the factorized model and its predicted losses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from acip_export.checkpoint import Checkpoint
from acip_export.factor_cache import FactorCache
from acip_export.factorize import Components, Whitening
from acip_export.rank.config import Basis, ProgressCallback, silent
from acip_export.rank.parametrize import AdapterShape, MaskedLinear, replace_linear
from acip_export.rank.statistics import ComponentLosses, Statistics, component_losses, dense_sensitivity
from acip_export.rank.timing import Clock
from acip_export.scores import FloatArray

_Result = TypeVar("_Result")
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
    cache: FactorCache | None = None,
) -> Factorized:
    """Replace every linear layer of ``model`` in place; the dense weights are released one by one.

    As many layers are factorized side by side as torch has threads, one thread each: an SVD gains little from more.
    """
    cache = cache or FactorCache(None)
    layers, losses, singular, sensitivity, whitenings = {}, {}, {}, {}, {}
    roots: dict[str, Whitening] = {}

    def whitening(moment_key: str, moment: torch.Tensor, wanted: bool) -> Whitening | None:
        if wanted and moment_key not in roots:
            roots[moment_key] = Whitening.of(moment)
        return roots[moment_key] if wanted else None

    clock = Clock("components", len(checkpoint.linear_modules), 0, progress)
    for name in checkpoint.linear_modules:
        whitenings[name] = (
            whitening(statistics.input_keys[name], statistics.input_of(name), basis in ("input", "kfac")),
            whitening(statistics.gradient_keys[name], statistics.gradient_of(name), basis == "kfac"),
        )

    def factorize(name: str) -> Components:
        return cache.components(model.get_parameter(f"{name}.weight").detach().cpu(), *whitenings[name])

    for name, components in side_by_side(factorize, list(checkpoint.linear_modules)):
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)  # load_model has checked it
        inputs, gradients = statistics.input_of(name), statistics.gradient_of(name)
        weight = dense.weight.detach().cpu()
        exact = statistics.sensitivity.get(name)
        estimate = dense_sensitivity(weight, inputs, gradients)
        losses[name] = component_losses(components, inputs, gradients, 1.0 if exact is None else exact / estimate)
        singular[name] = components.singular.numpy()
        sensitivity[name] = estimate if exact is None else exact
        layers[name] = MaskedLinear(components, dense, mask_scale, adapter)
        replace_linear(model, name, layers[name])
        clock.advance()
    return Factorized(layers, losses, singular, sensitivity, whitenings)


def side_by_side(work: Callable[[str], _Result], names: Sequence[str]) -> Iterator[tuple[str, _Result]]:
    """``work`` of every name, in order; no more results wait at any time than torch has threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        for name in names:
            yield name, work(name)
        return
    waiting: deque[tuple[str, Future[_Result]]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name in names:
                waiting.append((name, pool.submit(work, name)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
    finally:
        torch.set_num_threads(threads)  # what one thread sets, parts of torch take for all
