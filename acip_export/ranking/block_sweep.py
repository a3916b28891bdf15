"""Go forward and backward through a model block by block: memory holds one block's weights and activations of a batch.

Forward, all of the text passes through one block before the next; what enters a block is kept in a scratch file, batch
by batch. Backward, from the last block to the first, each block is computed again, with gradients. Whoever measures
something in a block is done with it before the next, and its weights are read once in each direction. That costs one
forward pass more than to keep all activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from acip_export.model.block_chain import Arguments, BlockChain
from acip_export.progress import Clock
from acip_export.ranking.context import RankContext
from acip_export.ranking.load import weights_from_file
from acip_export.ranking.sharding import by_block
from acip_export.ranking.stored_tensors import StoredTensors

# Work of a window in one block, backward, as a multiple of what it is forward: for the time left.
_BACKWARD = 3
_STATES = "states"

Steps = Iterator[tuple[Tensor, Callable[[], None]]]


class Blocks(BlockChain):
    """The blocks of a context's model.

    Attributes:
        members: the linear layers of each, by its name.
    """

    def __init__(self, context: RankContext) -> None:
        self.members = dict(by_block(context.checkpoint.linear_modules))
        super().__init__(context.model, self.members, "be ranked")
        self._checkpoint, self._task = context.checkpoint, context.task

    def weights(self, number: int) -> AbstractContextManager[None]:
        """See :class:`BlockChain`."""
        return weights_from_file(self._checkpoint, self.model, self.members[self.names[number]])

    def enter(self, windows: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Return what the first block reads, a function of what the embedding returns, and the arguments of all blocks.

        Raises:
            UnsupportedError: the blocks are no chain.
        """
        # To the end: a sharded model is put together and taken apart again by what is around its parts.
        return self._entered(lambda: self._task.run_through(self.model, windows))


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
        depth, length = len(self.blocks.names), batches[0][1].shape[1]
        total = depth * (windows + _BACKWARD * graded_windows)
        self.work = context.work
        forth, back = (
            sum(step(name) in self.work for name in self.blocks.names) for step in (forward_step, backward_step)
        )
        done = windows * forth + _BACKWARD * graded_windows * back
        self.clock = Clock(stage, total, context.progress, tokens=length * windows / total, done=done)
        self.states = StoredTensors(self.work.scratch(_STATES))
        self._entered: list[tuple[Tensor, list[Arguments]]] = []

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
                hidden, arguments = self.blocks.enter(part)
            if not begun:
                self.states[self._place(0, index)] = hidden
            # Only what goes backward needs its way back into the embedding.
            self._entered.append((hidden if index < self.graded else hidden[:0], arguments))

        @torch.no_grad()
        def step(number: int, index: int) -> None:
            hidden = self._state(self._place(number, index), index)
            self.states[self._place(number + 1, index)] = self.blocks.run(number, hidden, self._entered[index][1])

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
            leaf = self._state(self._place(len(self.blocks.names), index), index).requires_grad_()
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
        entered, arguments = self._entered[index]
        hidden = self._state(self._place(number, index), index).requires_grad_()
        output = self.blocks.run(number, hidden, arguments)
        output.backward(self._state(f"gradient/{index}", index))  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        if number:
            self.states[f"gradient/{index}"] = hidden.grad
        elif entered.requires_grad:
            entered.backward(hidden.grad)  # type: ignore[no-untyped-call]

    def _place(self, number: int, index: int) -> str:
        """Name the hidden states that enter a block: those that do not go backward take each other's place."""
        return f"{number}/{index}" if index < self.graded else f"now/{index}"

    def _state(self, place: str, index: int) -> Tensor:
        return self.states[place].to(self.batches[index][1].device)
