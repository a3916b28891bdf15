"""Run one text through several variants of a model at once, block by block.

A variant differs from the dense model in some tensors, and in how its products round what they read. The weights of
one block are made when its turn has come and let go after it: beside the dense model, memory holds the changed tensors
of one block of one variant, and the hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from acip_export.errors import UnsupportedError
from acip_export.io.kept_states import KeptStates
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of

# Numbers of log-probabilities at a time.
_AT_ONCE = 2**23
# The dense model's hidden states, among kept ones.
_DENSE = "dense"


class Variant(Protocol):
    """A changed model."""

    def tensors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the changed tensors among those named, float32; all others stay dense."""
        ...

    def input_blocks(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return, of the named matrices that are multiplied with int8, how many numbers share a scale."""
        ...


@dataclass(frozen=True)
class MeasuredDivergence:
    """KL divergence from the dense model, nats per token.

    Attributes:
        error: standard error of the mean over tokens.
        same_top: share of tokens whose likeliest next one is the dense model's.
    """

    kl: float
    error: float
    same_top: float
    tokens: int


@dataclass(frozen=True)
class Changes:
    """What a variant says of some tensors."""

    tensors: Mapping[str, Tensor]
    input_blocks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, variant: Variant, names: Sequence[str]) -> Changes:
        """Ask a variant."""
        return cls(variant.tensors(names), variant.input_blocks(names))

    def __bool__(self) -> bool:
        return bool(self.tensors) or bool(self.input_blocks)


class _Stop(Exception):  # noqa: N818 - no error
    """All that is wanted of a pass is known."""


class BlockPasses:
    """A model's blocks, and what each is called with for one text.

    Args:
        model: frozen, in evaluation mode. blocks: names of its blocks, in the order in which they compute.
        windows: (n, tokens) int64.

    Attributes:
        windows: may be replaced by others.
        parameters: names of the parameters of each block, and of what is outside of all of them under ``""``.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], windows: Tensor) -> None:
        self.model, self.names, self.windows = model, list(blocks), windows
        self.blocks = [model.get_submodule(name) for name in blocks]
        self._returns_tuple: bool | None = None
        inside = tuple(f"{name}." for name in blocks)
        self.parameters: dict[str, list[str]] = {name: [] for name in (*blocks, "")}
        for name, _ in model.named_parameters():
            block = next((prefix[:-1] for prefix in inside if name.startswith(prefix)), "")
            self.parameters[block].append(name)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # A head that shares the embedding's weight goes by the embedding's name.
        self._products: dict[str, list[nn.Module]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                self._products.setdefault(names[id(module.weight)], []).append(module)

    @torch.no_grad()
    def divergences(
        self,
        variants: Sequence[Variant],
        advance: Callable[[], None] = lambda: None,
        kept: KeptStates | None = None,
    ) -> list[MeasuredDivergence]:
        """Measure every variant on all windows.

        Args:
            advance: called after each block of each variant, the dense model being one.
            kept: of the same variants and windows, read and filled: blocks that are behind are left out.
        """
        outside = [Changes.of(variant, self.parameters[""]) for variant in variants]
        dense, arguments = self.enter({})
        hidden = [self.enter(changes.tensors)[0] if changes.tensors else dense for changes in outside]
        behind = kept.blocks if kept is not None else 0
        if kept is not None and behind:
            states = kept.restored()
            # Those that are not there are as the dense model's still.
            dense = states[_DENSE]
            hidden = [states.get(str(index), dense) for index in range(len(hidden))]
        for number, (name, block) in enumerate(zip(self.names, self.blocks, strict=True)):
            if number < behind:
                continue
            before = dense
            dense = through(block, {}, before, arguments[number])
            advance()
            for index, variant in enumerate(variants):
                changes = Changes.of(variant, self.parameters[name])
                if not changes and hidden[index] is before:
                    hidden[index] = dense
                else:
                    own = {key.removeprefix(f"{name}."): value for key, value in changes.tensors.items()}
                    with self._rounding(changes.input_blocks):
                        hidden[index] = through(block, own, hidden[index], arguments[number])
                advance()
            if kept is not None:
                differing = {str(index): states for index, states in enumerate(hidden) if states is not dense}
                kept.passed(number + 1, {_DENSE: dense, **differing})
        return self._compare(dense, hidden, outside)

    def enter(self, changed: Mapping[str, Tensor]) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Return what the first block reads, and the other arguments of every block."""
        entered: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first = self.blocks[0]

        def given(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if entered and hidden is not entered[-1]:
                raise UnsupportedError("a model whose blocks are no chain cannot be measured block by block")
            entered.append(hidden)
            arguments.append((rest, kwargs))
            if len(arguments) == len(self.blocks):
                raise _Stop
            if self._returns_tuple is None:
                self._returns_tuple = not isinstance(type(first).forward(first, hidden, *rest, **kwargs), Tensor)
            return self._returned(hidden)

        with self._instead([given] * len(self.blocks)), suppress(_Stop):
            self._call(changed, self.windows)
        return entered[0], arguments

    def leave(self, changes: Changes, hidden: Tensor, window: Tensor) -> Tensor:
        """Return the logits (tokens, vocabulary) of one window that leaves the last block as ``hidden``."""
        handed_on = [lambda *_args, **_kwargs: self._returned(hidden)] * len(self.blocks)
        with self._instead(handed_on), self._rounding(changes.input_blocks):
            logits: Tensor = self._call(changes.tensors, window[None]).logits[0]
        return logits

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _call(self, changed: Mapping[str, Tensor], windows: Tensor) -> Any:
        return functional_call(self.model, dict(changed), (), {"input_ids": windows, "use_cache": False})

    @contextmanager
    def _instead(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Let the blocks do something else."""
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @contextmanager
    def _rounding(self, input_blocks: Mapping[str, int]) -> Iterator[None]:
        """Round what the named matrices are multiplied with."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, block=block: (in_int8(args[0], block), *args[1:]))
            for name, block in input_blocks.items()
            for module in self._products.get(name, ())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, dense: Tensor, hidden: Sequence[Tensor], outside: Sequence[Changes]) -> list[MeasuredDivergence]:
        found: list[list[Tensor]] = [[] for _ in hidden]
        same = [0] * len(hidden)
        for number, window in enumerate(self.windows):
            expected = self.leave(Changes({}), dense[number : number + 1], window)
            for index, (states, changes) in enumerate(zip(hidden, outside, strict=True)):
                if states is dense and not changes:
                    found[index].append(torch.zeros(len(expected)))
                    same[index] += len(expected)
                    continue
                logits = self.leave(changes, states[number : number + 1], window)
                found[index].append(_divergence(expected, logits))
                same[index] += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        return [_measured(torch.cat(each).double().numpy(), top) for each, top in zip(found, same, strict=True)]


def in_int8(rows: Tensor, block: int) -> Tensor:
    """Round rows (..., width) to 8 bits, ``block`` numbers at a time under one scale, their largest being 127."""
    width = rows.shape[-1]
    padded = nn.functional.pad(rows, (0, -width % block))
    blocks = padded.view(*rows.shape[:-1], -1, block)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127
    rounded: Tensor = (blocks / scales).round().mul_(scales).view_as(padded)[..., :width]
    return rounded


def blocks_of(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a model's blocks, in the order in which they compute."""
    return list(dict.fromkeys(block for name in checkpoint.linear_modules if (block := block_of(name)) is not None))


def through(
    block: nn.Module, changed: Mapping[str, Tensor], hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> Tensor:
    """Return what a block makes of ``hidden``, with some tensors changed, named as in the block."""
    output = functional_call(block, dict(changed), (hidden, *arguments[0]), arguments[1])
    left: Tensor = output if isinstance(output, Tensor) else output[0]
    return left


def _divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL divergence by token, (tokens,)."""
    parts = []
    for start in range(0, len(dense), step := max(1, _AT_ONCE // dense.shape[1])):
        believed = dense[start : start + step].float().log_softmax(-1)
        predicted = logits[start : start + step].float().log_softmax(-1)
        parts.append((believed.exp() * (believed - predicted)).sum(-1))
    return torch.cat(parts)


def _measured(kl: np.ndarray, same: int) -> MeasuredDivergence:
    error = float(kl.std(ddof=1)) / sqrt(len(kl)) if len(kl) > 1 else 0.0
    return MeasuredDivergence(float(kl.mean()), error, same / len(kl), len(kl))
