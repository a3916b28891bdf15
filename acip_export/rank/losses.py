"""Losses over a vocabulary that keep one copy of the logits, not five.

Written for autograd they would keep, for every token, the logits, their float32 copy, the log-probabilities and the
gradients of each; over a large vocabulary that outweighs the model. Here the backward pass is written out, chunk by
chunk of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens at a time; temporaries are this times the vocabulary.
_CHUNK = 256


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of ``labels`` (n,) under ``logits`` (n, vocabulary), nats, float32."""
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token after the first."""
    logits: Tensor = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return token_cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def token_divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Mean KL divergence of ``logits`` (n, vocabulary) from ``dense`` (n, vocabulary), nats, float32."""
    loss: Tensor = _Divergence.apply(logits, dense)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        total = logits.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(labels), _CHUNK):
            rows, chosen = logits[begin : begin + _CHUNK].float(), labels[begin : begin + _CHUNK, None]
            total += (rows.logsumexp(-1) - rows.gather(-1, chosen)[:, 0]).sum()
        return total / len(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        result = torch.empty_like(logits)
        scale = gradient / len(labels)
        for begin in range(0, len(labels), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            probabilities = logits[part].float().softmax(-1)
            chosen = labels[part, None]
            probabilities.scatter_add_(-1, chosen, -torch.ones_like(chosen, dtype=torch.float32))
            result[part] = probabilities.mul_(scale)
        return result, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        ctx.save_for_backward(logits, dense)
        total = logits.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(logits), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            believed = dense[part].float().log_softmax(-1)
            total += (believed.exp() * (believed - logits[part].float().log_softmax(-1))).sum()
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, dense = ctx.saved_tensors
        result = torch.empty_like(logits)
        scale = gradient / len(logits)
        for begin in range(0, len(logits), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            difference = logits[part].float().softmax(-1).sub_(dense[part].float().softmax(-1))
            result[part] = difference.mul_(scale)
        return result, None
