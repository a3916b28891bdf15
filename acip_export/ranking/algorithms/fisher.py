"""What each component would be missed for, measured on the masks themselves.

With m the mask of a component, z = sum_t dL_t/dm over a window and labels drawn from the model, E[z^2] per unit of the
task (token, or text) is the diagonal of the Fisher information of the masks, and half of it the second-order loss of
dropping the component. Unlike the Kronecker-factored estimate it knows how inputs and gradients go together, and tokens
with each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from acip_export.ranking.config import ProgressCallback, silent
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.processes import ALONE, Processes
from acip_export.ranking.tasks import CAUSAL, Task
from acip_export.ranking.timing import Clock

# Every window is one sample of z; shorter ones give more samples of the same text.
_LONGEST_WINDOW = 128


def component_fisher(
    model: nn.Module,
    layers: Mapping[str, MaskedLinear],
    windows: Tensor,
    batch_tokens: int,
    seed: int,
    progress: ProgressCallback = silent,
    task: Task = CAUSAL,
    processes: Processes = ALONE,
) -> dict[str, npt.NDArray[np.float64]]:
    """Predicted loss of dropping each component of the dense model, (k,) in the task's unit, by module."""
    length = min(windows.shape[1], _LONGEST_WINDOW) if task.padding is None else windows.shape[1]
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    sums = {name: torch.zeros(len(layer.mask), dtype=torch.float64) for name, layer in layers.items()}
    device = next(iter(layers.values())).up.device
    clock = Clock("fisher", len(pieces), length, progress)
    try:
        with dense_behaviour(layers):
            for first, part in processes.batches(pieces, max(1, batch_tokens // length)):
                for layer in layers.values():
                    layer.probe = torch.ones(len(part), 1, len(layer.mask), device=device, requires_grad=True)
                outputs = task.outputs(model, task.trimmed(part.to(device)))
                generator = torch.Generator().manual_seed((seed << 32) + first)
                task.sampled_loss(outputs, generator).backward()  # type: ignore[no-untyped-call]
                for name, layer in layers.items():
                    assert layer.probe is not None and layer.probe.grad is not None
                    by_place = layer.probe.grad.double().square().sum((0, 1)).cpu()
                    sums[name][layer.arrangement.cpu()] += by_place
                clock.advance(len(part) * processes.count)
    finally:
        for layer in layers.values():
            layer.probe = None
    return {name: (0.5 * processes.sum(total) / task.units(pieces)).numpy() for name, total in sums.items()}
