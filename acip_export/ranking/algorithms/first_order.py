"""First-order loss estimates and the order that keeps their sum near zero (Zero Sum SVD, arXiv 2602.02848).

In the input-whitened basis, dropping a component of singular value s changes the calibration loss by about -s dL/ds,
which is -dL/dm for its mask m at one. The estimates have both signs. Components are dropped one after the other, within
a module from the smallest singular value up: of the modules' next candidates, the one with the smallest absolute
estimate among those whose sign brings the sum of all estimates so far back towards zero.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from acip_export.artifacts.scores import FloatArray
from acip_export.ranking.config import ProgressCallback, silent
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.processes import ALONE, Processes
from acip_export.ranking.tasks import CAUSAL, Task
from acip_export.ranking.timing import Clock


def first_order_changes(
    model: nn.Module,
    layers: Mapping[str, MaskedLinear],
    windows: Tensor,
    batch: int,
    seed: int = 0,
    progress: ProgressCallback = silent,
    task: Task = CAUSAL,
    processes: Processes = ALONE,
) -> dict[str, npt.NDArray[np.float64]]:
    """-dL/dm of every component at the dense model, (k,) nats per unit of ``task``, by module; L is the task's
    :meth:`~acip_export.ranking.tasks.Task.labelled_loss`: a divergence from the dense model has no first order there.
    """
    sums = {name: torch.zeros(len(layer.mask), dtype=torch.float64) for name, layer in layers.items()}
    device = next(iter(layers.values())).up.device
    clock = Clock("first-order", len(windows), windows.shape[1], progress)
    try:
        with dense_behaviour(layers):
            for first, part in processes.batches(windows, batch):
                # What is random in a batch follows from its place in the text, whichever process has it.
                torch.manual_seed((seed << 32) + first)
                for layer in layers.values():
                    layer.probe = torch.ones(1, 1, len(layer.mask), device=device, requires_grad=True)
                loss = task.labelled_loss(model, task.trimmed(part.to(device)))
                loss.backward()  # type: ignore[no-untyped-call]
                for name, layer in layers.items():
                    assert layer.probe is not None and layer.probe.grad is not None
                    sums[name][layer.arrangement.cpu()] -= layer.probe.grad.double().flatten().cpu() * task.units(part)
                clock.advance(len(part) * processes.count, loss=loss.item())
    finally:
        for layer in layers.values():
            layer.probe = None
    return {name: (processes.sum(total) / task.units(windows)).numpy() for name, total in sums.items()}


def zero_sum_scores(
    changes: Mapping[str, npt.NDArray[np.float64]], singular: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """Scores by module, by component: the place in the order of dropping, from 1 for the first.

    Args:
        changes: first-order estimates. singular: singular values; equal ones are dropped from the last component up.
    """
    queues = {
        name: (len(values) - 1 - np.argsort(values[::-1], kind="stable")).tolist() for name, values in singular.items()
    }
    scores = {name: np.zeros(len(values), np.float32) for name, values in singular.items()}
    names = list(singular)
    heaps: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    places = [0] * len(names)

    def offer(module: int) -> None:
        queue = queues[names[module]]
        if places[module] < len(queue):
            change = float(changes[names[module]][queue[places[module]]])
            heapq.heappush(heaps[change > 0], (abs(change), module))

    for module in range(len(names)):
        offer(module)
    total, position = 0.0, 0
    while heaps[True] or heaps[False]:
        wanted = total <= 0
        sign = wanted if heaps[wanted] else not wanted
        size, module = heapq.heappop(heaps[sign])
        total += size if sign else -size
        position += 1
        scores[names[module]][queues[names[module]][places[module]]] = position
        places[module] += 1
        offer(module)
    return scores
