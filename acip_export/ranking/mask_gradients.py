"""Measure gradients of the components' masks at the dense model: Fisher information and first-order changes.

Every layer gets a probe of ones that its components are multiplied with, by window; its gradient is that of the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from acip_export.progress import Clock
from acip_export.ranking.block_sweep import BlockSweep
from acip_export.ranking.context import RankContext
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.sharding import by_block

# Every window is one sample of the Fisher information; shorter ones give more samples of the same text.
_LONGEST_WINDOW = 128


def component_fisher(context: RankContext, layers: Mapping[str, MaskedLinear]) -> dict[str, npt.NDArray[np.float64]]:
    """Predict the loss of dropping each component of the dense model, (k,) in the task's unit, by module.

    With m the mask of a component, z = sum_t dL_t/dm over a window and labels drawn from the model, E[z^2] per what
    the task counts is the diagonal of the Fisher information of the masks, and half of it the second-order loss of
    dropping the component. Unlike the Kronecker-factored estimate it knows how inputs and gradients go together, and
    tokens with each other.
    """
    task, windows, processes = context.task, context.windows, context.processes
    length = min(windows.shape[1], _LONGEST_WINDOW) if task.padding is None else windows.shape[1]
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    sums = _zeros(layers)

    def tail(first: int, part: Tensor) -> float:
        generator = torch.Generator().manual_seed((context.seed << 32) + first)
        return task.backward_sampled(context.model, part, generator) / task.counted(part)

    members = dict(by_block(layers))
    sweep = BlockSweep(context.model, list(members), processes, context.scratch)
    size = max(1, context.batch * windows.shape[1] // length)
    with _probed(layers) as device:
        batches = [(first, task.trimmed(part.to(device))) for first, part in processes.batches(pieces, size)]
        with sweep.run("fisher", batches, len(pieces), tail, context.progress) as blocks:
            for block, steps in blocks:
                inside = {name: layers[name] for name in members[block]}
                for part, step in steps:
                    for layer in inside.values():
                        layer.probe = torch.ones(len(part), 1, len(layer.mask), device=device, requires_grad=True)
                    step()
                    for name, layer in inside.items():
                        sums[name][layer.arrangement.cpu()] += _gradient(layer).square().sum((0, 1)).cpu()
                        layer.probe = None
    counted = task.counted(pieces)
    return {name: (0.5 * processes.sum(total) / counted).numpy() for name, total in sums.items()}


def first_order_changes(context: RankContext, layers: Mapping[str, MaskedLinear]) -> dict[str, npt.NDArray[np.float64]]:
    """Estimate the change of the loss L when a component is dropped, -dL/dm at the dense model, (k,) by module.

    L is the task's :meth:`~acip_export.ranking.tasks.Task.labelled_loss`, per what it counts: a divergence from the
    dense model has no first order there.
    """
    task, windows, processes = context.task, context.windows, context.processes
    clock = Clock("first-order", len(windows), context.progress, tokens=windows.shape[1])
    sums = _zeros(layers)
    with _probed(layers) as device:
        for first, part in processes.batches(windows, context.batch):
            # What is random in a batch follows from its place in the text, whichever process has it.
            torch.manual_seed((context.seed << 32) + first)
            for layer in layers.values():
                layer.probe = torch.ones(1, 1, len(layer.mask), device=device, requires_grad=True)
            loss = task.labelled_loss(context.model, task.trimmed(part.to(device)))
            loss.backward()  # type: ignore[no-untyped-call]
            for name, layer in layers.items():
                sums[name][layer.arrangement.cpu()] -= _gradient(layer).flatten().cpu() * task.counted(part)
            clock.advance(len(part) * processes.count, loss=loss.item())
    return {name: (processes.sum(total) / task.counted(windows)).numpy() for name, total in sums.items()}


def _zeros(layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
    return {name: torch.zeros(len(layer.mask), dtype=torch.float64) for name, layer in layers.items()}


@contextmanager
def _probed(layers: Mapping[str, MaskedLinear]) -> Iterator[torch.device]:
    """Let the layers act as the dense ones did, and take the probes away in the end."""
    try:
        with dense_behaviour(layers):
            yield next(iter(layers.values())).up.device
    finally:
        for layer in layers.values():
            layer.probe = None


def _gradient(layer: MaskedLinear) -> Tensor:
    assert layer.probe is not None and layer.probe.grad is not None
    return layer.probe.grad.double()
