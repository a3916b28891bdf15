"""Compute losses over a vocabulary that keep the logits and their gradient, and nothing else.

Written for autograd they would keep, for every token, the logits, their float32 copy, the log-probabilities and the
gradients of each; over a large vocabulary that outweighs the model. Here the forward pass, which has the probabilities
of a few tokens at hand anyway, leaves the gradient behind, in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from acip_export.ranking.vocabulary import (
    attached,
    can_slice,
    final_hidden,
    head_alone,
    token_slices,
    vocabulary_of,
)

# Logits at a time: their float32 copies (2 MB each) stay in a processor's cache.
_AT_ONCE = 2**19


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of ``labels`` (n,) under ``logits`` (n, vocabulary), in nats.

    The result is float32 or wider. Negative labels stand for none: their tokens do not count.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of each token after the first, never with all logits at a time."""
    labels = _next_tokens(windows)
    if not can_slice(model):
        logits: Tensor = model(input_ids=windows, use_cache=False).logits
        return token_cross_entropy(logits.flatten(0, 1), labels)
    hidden = final_hidden(model, windows)
    rows, counted = hidden.detach().flatten(0, -2), int((labels >= 0).sum())
    gradient = torch.empty_like(rows) if hidden.requires_grad else None
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    with head_alone(model) as logits_of:
        for part in token_slices(len(rows), vocabulary_of(model)):
            share = int((labels[part] >= 0).sum()) / counted
            if not share:
                if gradient is not None:
                    gradient[part] = 0
                continue
            leaf = rows[part].clone().requires_grad_(gradient is not None)
            loss = token_cross_entropy(logits_of(leaf), labels[part])
            total += share * loss.detach()
            if gradient is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradient[part] = share * leaf.grad
    return total if gradient is None else attached(total, hidden, gradient.view_as(hidden))


@torch.no_grad()
def measured_next_tokens(model: nn.Module, windows: Tensor, rows: Tensor, dense: Tensor) -> tuple[float, float]:
    """Return :func:`next_token_loss`, and the mean KL divergence from the dense model, in nats per token.

    Args:
        rows, dense: of this model and of the dense one, by :func:`before_head`.
    """
    labels, sliced = _next_tokens(windows), can_slice(model)
    labelled, loss, divergence = int((labels >= 0).sum()), 0.0, 0.0
    with head_alone(model) if sliced else nullcontext(_unchanged) as logits_of:
        for part in token_slices(len(rows), vocabulary_of(model) if sliced else rows.shape[1]):
            logits = logits_of(rows[part])
            divergence += float(token_divergence(logits, logits_of(dense[part]))) * len(logits) / len(rows)
            if count := int((labels[part] >= 0).sum()):
                loss += float(token_cross_entropy(logits, labels[part])) * count / labelled
            del logits  # before the next ones are made
    return loss, divergence


def before_head(model: nn.Module, windows: Tensor) -> Tensor:
    """Return what the head reads for each token, (tokens, width); logits, where they are made of all tokens at once."""
    if can_slice(model):
        return final_hidden(model, windows).flatten(0, -2)
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits.flatten(0, 1)


def token_divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Compute the mean KL divergence of ``logits`` (n, vocabulary) from ``dense`` (n, vocabulary), in nats.

    The result is float32 or wider. Where ``logits`` wants a gradient, it is left in the storage of ``dense``, whose
    numbers are gone then.
    """
    loss: Tensor = _Divergence.apply(logits, dense)  # type: ignore[no-untyped-call]
    return loss


def _next_tokens(windows: Tensor) -> Tensor:
    """Return the label of each token.

    The last one has none; cutting its logits off would copy all others, and their gradients again.
    """
    return torch.cat([windows[:, 1:], windows.new_full((len(windows), 1), -1)], dim=1).flatten()


def _unchanged(logits: Tensor) -> Tensor:
    return logits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = _widened(logits.new_zeros(()))
        labelled = labels >= 0
        count = labelled.sum()
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in _parts(logits):
            believed = _widened(logits[part]).log_softmax(-1)
            chosen, counts = labels[part, None].clamp_min(0), labelled[part, None]
            total -= (believed.gather(-1, chosen) * counts).sum()
            if ctx.gradient is not None:
                probabilities = believed.exp_()
                probabilities.scatter_add_(-1, chosen, probabilities.new_full(chosen.shape, -1))
                ctx.gradient[part] = probabilities.mul_(counts / count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scaled(ctx, gradient), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        total = _widened(logits.new_zeros(()))
        ctx.gradient = dense if ctx.needs_input_grad[0] else None
        for part in _parts(logits):
            believed, predicted = _widened(dense[part]).log_softmax(-1), _widened(logits[part]).log_softmax(-1)
            probabilities = believed.exp()
            total += (probabilities * believed.sub_(predicted)).sum()
            if ctx.gradient is not None:
                ctx.gradient[part] = predicted.exp_().sub_(probabilities).div_(len(logits))
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scaled(ctx, gradient), None


def _parts(logits: Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // logits.shape[1])
    for begin in range(0, len(logits), step):
        yield slice(begin, begin + step)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scaled(ctx: Any, factor: Tensor) -> Tensor:
    """Scale the gradient, in place; a second backward pass would scale it twice, so it finds none."""
    gradient: Tensor = ctx.gradient
    ctx.gradient = None
    return gradient.mul_(factor)
