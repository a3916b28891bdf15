"""Measure gradients of the components' masks at the dense model: Fisher information and first-order changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from acip_export.progress import Clock
from acip_export.ranking.context import RankContext
from acip_export.ranking.factorized_model import Factorized
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.sharding import by_block
from acip_export.ranking.side_by_side import side_by_side
from acip_export.ranking.stored_tensors import StoredTensors

# Every stretch of so many tokens is one sample of the Fisher information; shorter ones give more samples of a text.
_LONGEST_STRETCH = 32


def component_fisher(context: RankContext, factorized: Factorized) -> dict[str, npt.NDArray[np.float64]]:
    """Predict the loss of dropping each component of the dense model, (k,) in the task's unit, by module.

    With m the mask of a component, z = sum_t dL/dm over a stretch of text and labels drawn from the model, E[z^2] per
    what the task counts is the diagonal of the Fisher information of the masks, and half of it the second-order loss
    of dropping the component. Unlike the Kronecker-factored estimate it knows how inputs and gradients go together,
    and tokens with each other. A token's dL/dm is (down x)(up^T g), so the samples of the statistics are enough.
    """
    task, processes, statistics = context.task, context.processes, factorized.statistics
    samples = statistics.samples
    assert samples is not None
    stretch = _LONGEST_STRETCH if task.padding is None else context.graded.shape[1]
    counted, device = task.counted(context.graded), context.processes.device
    work, blocks = context.work, by_block(factorized.singular)
    stored = StoredTensors(work.scratch("fisher"))
    done = {name for block, names in blocks if f"fisher {block}" in work for name in names}
    clock = Clock("fisher", len(factorized.singular), context.progress, done=len(done))

    def measure(name: str) -> Tensor:
        up, down = (factor.to(device, torch.float32) for factor in factorized.pair(name))
        total = torch.zeros(len(down), dtype=torch.float64)
        both = samples.of(statistics.input_keys[name]), samples.of(statistics.gradient_keys[name])
        for x, g in zip(*both, strict=True):
            by_token = (x.to(device) @ down.T).mul_(g.to(device) @ up)
            for part in by_token.split(stretch, dim=1):  # type: ignore[no-untyped-call]
                total += part.sum(1).square().sum(0).cpu()
        return total

    losses = {}
    with closing(side_by_side(measure, [name for name in factorized.singular if name not in done])) as measured:
        for block, names in blocks:
            for name in names:
                if name not in done:
                    stored[name] = 0.5 * processes.sum(next(measured)[1]) / counted
                    clock.advance()
                losses[name] = stored[name].numpy()
            if f"fisher {block}" not in work:
                work.finish(f"fisher {block}")
    return losses


def first_order_changes(context: RankContext, layers: Mapping[str, MaskedLinear]) -> dict[str, npt.NDArray[np.float64]]:
    """Estimate the change of the loss L when a component is dropped, -dL/dm at the dense model, (k,) by module.

    L is the task's :meth:`~acip_export.ranking.tasks.Task.labelled_loss`, per what it counts: a divergence from the
    dense model has no first order there.
    """
    task, windows, processes = context.task, context.windows, context.processes
    sums, work = _zeros(layers), context.work
    stored, batches = StoredTensors(work.scratch("first-order")), processes.batches(windows, context.batch)
    rounds = -processes.least(-len(batches))
    behind = sum(len(part) for number, (_, part) in enumerate(batches) if f"first-order {number}" in work)
    if behind:
        sums = {name: stored[name] for name in sums}
    clock = Clock("first-order", len(windows), context.progress, tokens=windows.shape[1], done=behind * processes.count)
    with _probed(layers) as device:
        for number, (first, part) in enumerate(batches):
            if f"first-order {number}" in work:
                continue
            # What is random in a batch follows from its place in the text, whichever process has it.
            torch.manual_seed((context.seed << 32) + first)
            for layer in layers.values():
                layer.probe = torch.ones(1, 1, len(layer.mask), device=device, requires_grad=True)
            loss = task.labelled_loss(context.model, task.trimmed(part.to(device)))
            loss.backward()  # type: ignore[no-untyped-call]
            for name, layer in layers.items():
                sums[name][layer.arrangement.cpu()] -= _gradient(layer).flatten().cpu() * task.counted(part)
            for name, total in sums.items():
                stored[name] = total
            work.finish(f"first-order {number}")
            clock.advance(len(part) * processes.count, loss=loss.item())
    if len(batches) < rounds and f"first-order {rounds - 1}" not in work:  # others have a batch more
        work.finish(f"first-order {rounds - 1}")
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
