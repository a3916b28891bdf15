"""Losses that the masks and adapters are trained on, nats per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.rank.config import Objective
from acip_export.rank.parametrize import MaskedLinear, dense_behaviour


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token after the first."""
    logits = _logits(model, windows)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def divergence(model: nn.Module, layers: Mapping[str, MaskedLinear], windows: Tensor) -> Tensor:
    """Mean KL divergence of the model from its dense self; no second copy of the weights is needed."""
    model.eval()
    with torch.no_grad(), dense_behaviour(layers):
        dense = _logits(model, windows).log_softmax(-1).flatten(0, 1)
    model.train()
    return F.kl_div(
        _logits(model, windows).log_softmax(-1).flatten(0, 1), dense, reduction="batchmean", log_target=True
    )


def task_loss(objective: Objective, model: nn.Module, layers: Mapping[str, MaskedLinear], windows: Tensor) -> Tensor:
    return next_token_loss(model, windows) if objective == "ce" else divergence(model, layers, windows)


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits.float()
