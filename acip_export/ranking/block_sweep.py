"""Go forward and backward through a model block by block: memory holds one block's weights and activations of a batch.

Forward, all of the text passes through one block before the next; what enters a block is kept in a scratch file, batch
by batch. Backward, from the last block to the first, each block is computed again, with gradients. Whoever measures
something in a block is done with it before the next, and its weights are read once in each direction. That costs one
forward pass more than to keep all activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import UnsupportedError
from acip_export.model.block_model import Arguments, hidden_of, split_arguments
from acip_export.progress import Clock
from acip_export.ranking.context import RankContext
from acip_export.ranking.load import weights_from_file
from acip_export.ranking.sharding import by_block
from acip_export.ranking.stored_tensors import StoredTensors

# Work of a window in one block, backward, as a multiple of what it is forward: for the time left.
_BACKWARD = 3
_STATES = "states"

Steps = Iterator[tuple[Tensor, Callable[[], None]]]


@dataclass(frozen=True)
class Entry:
    """Hold what a batch brings to the blocks.

    Attributes:
        hidden: what enters the first block, as a function of the embedding's output. arguments: of every block, hidden
            states left out.
    """

    hidden: Tensor
    arguments: tuple[Arguments, ...]


class Blocks:
    """Run the blocks of a context's model one by one, and what is before and after them without them."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.members = dict(by_block(context.checkpoint.linear_modules))
        self.names = list(self.members)
        self.modules = [context.model.get_submodule(name) for name in self.names]
        self._tuples: dict[type[nn.Module], int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def enter(self, windows: Tensor) -> Entry:
        """Compute what is before the blocks.

        Raises:
            UnsupportedError: the blocks are no chain.
        """
        arguments: list[Arguments] = []
        states: list[Tensor] = []

        def passed(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden, rest = split_arguments(args, kwargs)
            if number and hidden is not states[-1]:
                raise UnsupportedError(
                    f"{self.names[number]} does not read what {self.names[number - 1]} returns; a model whose "
                    "blocks are no chain cannot be ranked"
                )
            arguments.append(rest)
            states[1:] = [hidden.detach()]
            if not number:
                states.insert(0, hidden)
            return states[-1]

        with self._instead(passed):
            self.context.task.run_through(self.context.model, windows)
        return Entry(states[0], tuple(arguments))

    def run(self, number: int, hidden: Tensor, entry: Entry) -> Tensor:
        """Compute block ``number`` of what enters it."""
        args, kwargs = entry.arguments[number]
        return hidden_of(self.modules[number](hidden, *args, **kwargs))

    @contextmanager
    def left(self, hidden: Tensor) -> Iterator[None]:
        """Let the model compute inside as if ``hidden`` were what leaves its last block."""
        last = len(self.names) - 1
        with self._instead(lambda number, args, kwargs: hidden if number == last else split_arguments(args, kwargs)[0]):
            yield

    def weights(self, number: int) -> Any:
        """Let a block compute inside with weights whose memory is given back afterwards."""
        return weights_from_file(self.context.checkpoint, self.context.model, self.members[self.names[number]])

    @contextmanager
    def _instead(self, forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Have ``forward`` of number and arguments in the place of the blocks; it returns hidden states."""

        def called(number: int, *args: Any, **kwargs: Any) -> Any:
            kind = type(self.modules[number])
            if kind not in self._tuples:  # what else it returns has to be seen once
                with torch.no_grad():
                    output = kind.forward(self.modules[number], *args, **kwargs)
                self._tuples[kind] = 0 if isinstance(output, Tensor) else len(output)
            hidden = forward(number, args, kwargs)
            count = self._tuples[kind]
            return (hidden, *[None] * (count - 1)) if count else hidden

        for number, block in enumerate(self.modules):
            block.forward = partial(called, number)
        try:
            yield
        finally:
            for block in self.modules:
                block.__dict__.pop("forward")


def forward_step(block: str) -> str:
    """Name the step of taking all batches forward through a block."""
    return f"forward {block}"


def backward_step(block: str) -> str:
    """Name the step of taking the graded batches back through a block."""
    return f"backward {block}"


class BlockSweep:
    """Take batches forward through all blocks, and some of them backward; the parameters want no gradients.

    Args:
        batches: of this process, with the index of each one's first window; of these, ``graded`` go backward.
        windows, graded_windows: of all processes together, for the progress.

    Attributes:
        states: what enters each block, and what came back so far; whoever measures may keep sums there until the sweep
            is closed.
    """

    def __init__(
        self,
        context: RankContext,
        stage: str,
        batches: Sequence[tuple[int, Tensor]],
        graded: int,
        windows: int,
        graded_windows: int,
    ) -> None:
        self.blocks, self.batches, self.graded, self.count = Blocks(context), batches, graded, context.processes.count
        depth, length = len(self.blocks), batches[0][1].shape[1]
        total = depth * (windows + _BACKWARD * graded_windows)
        self.work = context.work
        forth, back = (
            sum(step(name) in self.work for name in self.blocks.names) for step in (forward_step, backward_step)
        )
        done = windows * forth + _BACKWARD * graded_windows * back
        self.clock = Clock(stage, total, context.progress, tokens=length * windows / total, done=done)
        self.states = StoredTensors(self.work.scratch(_STATES))
        self._entries: list[Entry] = []

    def close(self) -> None:
        """Give the scratch file's room back."""
        self.work.drop(_STATES)

    def forward(self) -> Iterator[tuple[str, Steps]]:
        """Yield the blocks from the first to the last, each with its batches and what takes them through.

        All of a block's batches have to be taken, in order, and :func:`forward_step` of it be finished, before the next
        block is asked for. Blocks of which that is so before are left out.
        """
        begun = any(forward_step(name) in self.work for name in self.blocks.names)
        through = all(forward_step(name) in self.work for name in self.blocks.names)
        for index, (_, part) in enumerate(self.batches[: self.graded] if through else self.batches):
            with torch.set_grad_enabled(index < self.graded):
                entry = self.blocks.enter(part)
            if not begun:
                self.states[self._place(0, index)] = entry.hidden
            # Only what goes backward needs its way back into the embedding.
            self._entries.append(entry if index < self.graded else Entry(entry.hidden[:0], entry.arguments))

        @torch.no_grad()
        def step(number: int, index: int) -> None:
            hidden = self._state(self._place(number, index), index)
            self.states[self._place(number + 1, index)] = self.blocks.run(number, hidden, self._entries[index])

        def steps(number: int) -> Steps:
            with self.blocks.weights(number):
                for index, (_, part) in enumerate(self.batches):
                    yield part, partial(step, number, index)
                    self.clock.advance(len(part) * self.count)

        for number, name in enumerate(self.blocks.names):
            if forward_step(name) not in self.work:
                yield name, steps(number)

    def turn(self, tail: Callable[[int, Tensor], float]) -> None:
        """Run ``tail`` for every graded batch, by the index of its first window: it goes through the model and back."""
        for index, (first, part) in enumerate(self.batches[: self.graded]):
            leaf = self._state(self._place(len(self.blocks), index), index).requires_grad_()
            with self.blocks.left(leaf):
                loss = tail(first, part)
            assert leaf.grad is not None
            self.states[f"gradient/{index}"] = leaf.grad
            self.clock.advance(0, loss=loss)

    def backward(self) -> Iterator[tuple[str, Steps]]:
        """Yield the blocks from the last to the first, each with its graded batches and what takes them backward.

        As in :meth:`forward`, blocks of which :func:`backward_step` is finished are left out.
        """

        def steps(number: int) -> Steps:
            with self.blocks.weights(number):
                for index, (_, part) in enumerate(self.batches[: self.graded]):
                    yield part, partial(self._backward, number, index)
                    self.clock.advance(len(part) * self.count * _BACKWARD)

        for number, name in reversed(list(enumerate(self.blocks.names))):
            if backward_step(name) not in self.work:
                yield name, steps(number)

    def _backward(self, number: int, index: int) -> None:
        entry = self._entries[index]
        hidden = self._state(self._place(number, index), index).requires_grad_()
        output = self.blocks.run(number, hidden, entry)
        output.backward(self._state(f"gradient/{index}", index))  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        if number:
            self.states[f"gradient/{index}"] = hidden.grad
        elif entry.hidden.requires_grad:
            entry.hidden.backward(hidden.grad)  # type: ignore[no-untyped-call]

    def _place(self, number: int, index: int) -> str:
        """Name the hidden states that enter a block: those that do not go backward take each other's place."""
        return f"{number}/{index}" if index < self.graded else f"now/{index}"

    def _state(self, place: str, index: int) -> Tensor:
        return self.states[place].to(self.batches[index][1].device)
