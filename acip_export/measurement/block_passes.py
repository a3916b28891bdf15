"""Run one text through several variants of a model at once, block by block.

A variant differs from the dense model in some tensors, and in how its products round what they read. The weights of
one block are read or made when its turn has come and let go after it: memory holds one block, the changed tensors of
one variant, a slice of the head, and the hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from acip_export.io.kept_states import KeptStates
from acip_export.io.prefetch import one_ahead
from acip_export.materialization.rounded_weights import RoundedRows
from acip_export.model.block_chain import Arguments
from acip_export.model.block_model import BlockModel, Rows, StoredCheckpoint, rows_kept
from acip_export.model.checkpoint import Checkpoint

# Logits that are made at once: the head is read and widened as often. Log-probabilities of them are made of fewer.
_LOGITS, _LOG_PROBABILITIES = 2**25, 2**22
# The dense model's hidden states, among kept ones.
_DENSE = "dense"


class Variant(Protocol):
    """A changed model."""

    def tensors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the changed tensors among those named, float32; all others stay dense."""
        ...

    def rows(self, name: str) -> RoundedRows | None:
        """Return a large matrix, an embedding or a head; ``None``: it stays dense."""
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
    """What a variant says of some tensors.

    Attributes:
        head: its changed head, if these are the tensors outside of blocks.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    input_blocks: Mapping[str, int] = field(default_factory=dict)
    head: RoundedRows | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors) or bool(self.input_blocks) or self.head is not None


class BlockPasses:
    """Texts that pass through a model and its variants.

    Args:
        windows: (n, tokens) int64; may be replaced by others.

    Attributes:
        model: computes; it has no weights of its own.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        self.windows = windows
        self.model = BlockModel(StoredCheckpoint(checkpoint), "be measured block by block")
        large = {self.model.embedding, self.model.head}
        self._small = [name for name in self.model.parameters[""] if name not in large]

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

        Raises:
            UnsupportedError: the model's blocks are no chain.
        """
        model = self.model
        dense, arguments = self.enter()
        outside = [self._outside(variant) for variant in variants]
        hidden = [self._entered(dense, *pair) for pair in zip(variants, outside, strict=True)]
        behind = kept.blocks if kept is not None else 0
        if kept is not None and behind:
            states = kept.restored()
            # Those that are not there are as the dense model's still.
            dense = states[_DENSE]
            hidden = [states.get(str(index), dense) for index in range(len(hidden))]
        for number, (name, weights) in enumerate(one_ahead(model.read_block, model.names[behind:]), behind):
            before = dense
            dense = self.through(number, weights, before, arguments)
            advance()
            for index, variant in enumerate(variants):
                names = model.parameters[name]
                changes = Changes(variant.tensors(names), variant.input_blocks(names))
                if not changes and hidden[index] is before:
                    hidden[index] = dense
                else:
                    with self._rounding(changes.input_blocks):
                        hidden[index] = self.through(number, {**weights, **changes.tensors}, hidden[index], arguments)
                advance()
            if kept is not None:
                differing = {str(index): states for index, states in enumerate(hidden) if states is not dense}
                kept.passed(number + 1, {_DENSE: dense, **differing})
        return self._compare(dense, hidden, outside)

    def enter(self, outside: Mapping[str, Tensor] | None = None) -> tuple[Tensor, list[Arguments]]:
        """Return what the first block reads, and the other arguments of every block.

        Args:
            outside: all that is in no block; ``None``: the dense model's.
        """
        return self.model.enter(self.windows, self.dense_outside() if outside is None else outside)

    def through(
        self, number: int, weights: Mapping[str, Tensor], hidden: Tensor, arguments: Sequence[Arguments]
    ) -> Tensor:
        """Return what a block with these weights makes of ``hidden``."""
        with self.model.filled(weights):
            return self.model.run(number, hidden, arguments)

    def _outside(self, variant: Variant) -> Changes:
        names = self.model.parameters[""]
        return Changes(variant.tensors(self._small), variant.input_blocks(names), variant.rows(self.model.head))

    def dense_outside(self) -> dict[str, Tensor]:
        """Read what is in no block of the dense model, with as much of the embedding as the windows look up."""
        return self.model.read_outside() | {self.model.embedding: self.model.looked_up(self.windows)}

    def _entered(self, dense: Tensor, variant: Variant, changes: Changes) -> Tensor:
        """Return what a variant's first block reads; ``dense`` is the dense model's."""
        embedding = variant.rows(self.model.embedding)
        if embedding is None and not changes.tensors:
            return dense
        outside = {**self.dense_outside(), **changes.tensors}
        if embedding is not None:
            outside[self.model.embedding] = self.model.looked_up(self.windows, embedding.read)
        return self.enter(outside)[0]

    @contextmanager
    def _rounding(self, input_blocks: Mapping[str, int]) -> Iterator[None]:
        """Round what the named matrices are multiplied with."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, block=block: (in_int8(args[0], block), *args[1:]))
            for name, block in input_blocks.items()
            for module in self.model.products(name)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, dense: Tensor, hidden: Sequence[Tensor], outside: Sequence[Changes]) -> list[MeasuredDivergence]:
        """Compare what leaves the last block, by heads: each is made once, and one at a time."""
        of_head: dict[Hashable, list[int]] = {}
        for index, changes in enumerate(outside):
            of_head.setdefault(None if changes.head is None else changes.head.made_as, []).append(index)
        found: dict[int, MeasuredDivergence] = {}
        for indices in of_head.values():
            group = [(hidden[index], outside[index]) for index in indices]
            found |= zip(indices, self._compared(dense, group), strict=True)
        return [found[index] for index in range(len(hidden))]

    def _compared(self, dense: Tensor, group: Sequence[tuple[Tensor, Changes]]) -> list[MeasuredDivergence]:
        """Compare variants that have the same head."""
        kl: list[list[Tensor]] = [[] for _ in group]
        same = [0] * len(group)
        dense_rows, outside = self.model.stored.rows(self.model.head), self.model.read_outside()
        changed = group[0][1].head
        rows = dense_rows if changed is None else rows_kept(changed.read, self.model.head_shape, "a rounded head")
        for window, part in pieces(self.windows, _LOGITS // self.model.head_shape[0]):
            ids = self.windows[window : window + 1, part]
            expected = self._leave(dense[window : window + 1, part], ids, outside, dense_rows)
            for index, (states, changes) in enumerate(group):
                if states is dense and not changes:
                    kl[index].append(torch.zeros(len(expected)))
                    same[index] += len(expected)
                    continue
                with self._rounding(changes.input_blocks):
                    left = states[window : window + 1, part]
                    logits = self._leave(left, ids, {**outside, **changes.tensors}, rows)
                kl[index].append(_divergence(expected, logits))
                same[index] += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        return [_measured(torch.cat(each).double().numpy(), top) for each, top in zip(kl, same, strict=True)]

    def _leave(self, hidden: Tensor, ids: Tensor, outside: Mapping[str, Tensor], rows: Rows) -> Tensor:
        return self.model.leave(hidden, ids, outside, rows)[0]


def pieces(windows: Tensor, tokens: int) -> Iterator[tuple[int, slice]]:
    """Yield about so many tokens of one window at a time."""
    count, length = windows.shape
    for window in range(count):
        for start in range(0, length, step := max(1, tokens)):
            yield window, slice(start, min(start + step, length))


def in_int8(rows: Tensor, block: int) -> Tensor:
    """Round rows (..., width) to 8 bits, ``block`` numbers at a time under one scale, their largest being 127."""
    width = rows.shape[-1]
    padded = nn.functional.pad(rows, (0, -width % block))
    blocks = padded.view(*rows.shape[:-1], -1, block)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127
    rounded: Tensor = (blocks / scales).round().mul_(scales).view_as(padded)[..., :width]
    return rounded


def _divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence by token, (tokens,)."""
    parts = []
    for start in range(0, len(dense), step := max(1, _LOG_PROBABILITIES // dense.shape[1])):
        believed, predicted = (each[start : start + step].float().log_softmax(-1) for each in (dense, logits))
        parts.append((believed.exp() * (believed - predicted)).sum(-1))
    return torch.cat(parts)


def _measured(kl: np.ndarray, same: int) -> MeasuredDivergence:
    error = float(kl.std(ddof=1)) / sqrt(len(kl)) if len(kl) > 1 else 0.0
    return MeasuredDivergence(float(kl.mean()), error, same / len(kl), len(kl))
