"""Compute the losses that masks and adapters are trained on, in the task's unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from acip_export.ranking.config import Objective
from acip_export.ranking.losses import next_token_loss
from acip_export.ranking.masked_linear import MaskedLinear, dense_behaviour
from acip_export.ranking.tasks import Task


def divergence(task: Task, model: nn.Module, layers: Mapping[str, MaskedLinear], windows: Tensor) -> Tensor:
    """Measure the mean divergence of the model from its dense self; no second copy of the weights is needed."""
    model.eval()
    with torch.no_grad(), dense_behaviour(layers):
        dense = task.outputs(model, windows)
    model.train()
    return task.divergence(task.outputs(model, windows), dense) / task.counted(windows)


def task_loss(
    task: Task, objective: Objective, model: nn.Module, layers: Mapping[str, MaskedLinear], windows: Tensor
) -> Tensor:
    """Measure the loss that ``objective`` asks for, the mean over what the task counts."""
    windows = task.trimmed(windows)
    return next_token_loss(model, windows) if objective == "ce" else divergence(task, model, layers, windows)
