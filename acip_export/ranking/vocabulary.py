"""Make the logits of a causal model a few tokens at a time: over a large vocabulary, all of them outweigh the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Logits at a time: 64 MB in float32.
_AT_ONCE = 2**24
# Probabilities that are summed first when one of many is drawn.
_GROUP = 256


def can_slice(model: nn.Module) -> bool:
    """Tell whether the logits of ``model`` can be made without those of other tokens."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters and _decoder(model) is not model


def final_hidden(model: nn.Module, windows: Tensor) -> Tensor:
    """Return what the head reads, (n, length, width), and make no logits.

    Those of a single token would cost a copy of the whole head in float32 where it is stored in bfloat16.
    """
    seen: list[Any] = []
    # The whole model runs, not its decoder alone: where it is sharded, only that puts all of its parts together.
    handle = _decoder(model).register_forward_hook(lambda _m, _args, output: seen.append(output))
    try:
        model(input_ids=windows, use_cache=False, logits_to_keep=windows.new_empty(0))
    finally:
        handle.remove()
    hidden: Tensor = seen[0].last_hidden_state
    return hidden


@contextmanager
def head_alone(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from hidden states (n, width) to logits (n, vocabulary): all that ``model`` does to them."""
    decoder = _decoder(model)

    def logits(hidden: Tensor) -> Tensor:
        def given(*_args: Any, **_kwargs: Any) -> Any:
            return _Output(last_hidden_state=hidden[None])

        decoder.forward = given
        made: Tensor = model(input_ids=hidden.new_zeros(1, 1, dtype=torch.int64), use_cache=False).logits
        return made[0]

    try:
        yield logits
    finally:
        decoder.__dict__.pop("forward", None)


def vocabulary_of(model: nn.Module) -> int:
    """Return how many logits a token has."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


def token_slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Cut tokens into slices whose logits fit into a bounded piece of memory."""
    step = max(1, _AT_ONCE // vocabulary)
    for begin in range(0, tokens, step):
        yield slice(begin, min(begin + step, tokens))


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index (n,) from each row of ``probabilities`` (n, k), with one random number of the generator a row.

    By inverting the distribution function, first over groups, then within one: a pass over the probabilities, where
    :func:`torch.multinomial` draws a random number for each of them.
    """
    uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64).to(probabilities.device)
    missing = -probabilities.shape[1] % _GROUP
    groups = F.pad(probabilities, (0, missing)) if missing else probabilities
    groups = groups.reshape(len(probabilities), -1, _GROUP)
    sums = groups.sum(-1).double().cumsum(-1)
    place = uniform * sums[:, -1:]
    group = torch.searchsorted(sums, place, right=True).clamp_max(sums.shape[1] - 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp_min(0)), 0.0)
    inside = groups.gather(1, group[..., None].expand(-1, -1, _GROUP))[:, 0].double()
    reached = torch.searchsorted(inside.cumsum(-1), place - before, right=True)
    # Rounding may put the place behind the last of the group; what has no probability is never drawn.
    last = (inside > 0).long().mul(torch.arange(_GROUP, device=inside.device)).amax(-1, keepdim=True)
    return (group * _GROUP + torch.minimum(reached, last))[:, 0]


def attached(loss: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Return ``loss`` as a function of ``hidden`` with a ``gradient`` that is known already."""
    result: Tensor = _Attached.apply(loss, hidden, gradient)  # type: ignore[no-untyped-call]
    return result


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        known, ctx.gradient = ctx.gradient, None
        return None, known.mul_(gradient), None


class _Output(SimpleNamespace):
    """What a decoder returns, as far as heads look at it."""

    past_key_values = hidden_states = attentions = cross_attentions = router_logits = None

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        hidden: Tensor = self.last_hidden_state
        return hidden


def _decoder(model: nn.Module) -> nn.Module:
    decoder: nn.Module = getattr(model, "base_model", model)
    return decoder
