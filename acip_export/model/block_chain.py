"""Compute a model's blocks one by one, and what is before and behind them without them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import UnsupportedError

# What a block is called with, hidden states left out.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockChain(ABC):
    """A model whose blocks each read what the one before has returned.

    Args:
        model: has the blocks. names: of them, in the order in which they compute.
        unable: what a model whose blocks are no chain cannot, and what to do instead.

    Attributes:
        modules: the blocks.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], unable: str) -> None:
        self.model, self.names, self._unable = model, list(names), unable
        self.modules = [model.get_submodule(name) for name in self.names]
        # How many things a block of each kind returns as a tuple; 0: hidden states alone, and no tuple.
        self._returned: dict[type[nn.Module], int] = {}

    @abstractmethod
    def weights(self, number: int) -> AbstractContextManager[None]:
        """Let a block compute inside with weights whose memory is given back afterwards."""

    def run(self, number: int, hidden: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        """Compute a block, which has its weights, of what enters it; ``arguments`` are those of all blocks."""
        args, kwargs = arguments[number]
        output = self.modules[number](hidden, *args, **kwargs)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def _entered(self, compute: Callable[[], object], stop: bool = False) -> tuple[Tensor, list[Arguments]]:
        """Return what the first block reads when ``compute`` runs the model, and what all are called with beside it.

        Gradients pass through what the first block reads alone.

        Args:
            stop: nothing behind the blocks is computed.

        Raises:
            UnsupportedError: a block reads something else than what the block before it returns.
        """
        states: list[Tensor] = []
        arguments: list[Arguments] = []

        def pass_on(number: int, hidden: Tensor, rest: Arguments) -> Tensor:
            if number != len(arguments) or (number and hidden is not states[1]):
                raise UnsupportedError(
                    f"{self.names[number]} does not read what {self.names[number - 1]} returns; a model whose "
                    f"blocks are no chain cannot {self._unable}"
                )
            if not number:
                states.extend((hidden, hidden.detach()))
            arguments.append(rest)
            if stop and number == len(self.names) - 1:
                raise _Stopped
            return states[1]

        with self._instead(pass_on), suppress(_Stopped):
            compute()
        return states[0], arguments

    @contextmanager
    def left(self, hidden: Tensor) -> Iterator[None]:
        """Let the model compute inside as if ``hidden`` were what leaves its last block."""
        last = len(self.names) - 1
        with self._instead(lambda number, entered, _: hidden if number == last else entered):
            yield

    @contextmanager
    def _instead(self, forward: Callable[[int, Tensor, Arguments], Tensor]) -> Iterator[None]:
        """Have ``forward`` of number, hidden states and other arguments in the place of the blocks."""

        def called(number: int, *args: Any, **kwargs: Any) -> Any:
            if args:
                entered, rest = args[0], (args[1:], kwargs)
            else:
                entered, rest = kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
            hidden, kind = forward(number, entered, rest), type(self.modules[number])
            if kind not in self._returned:  # what else it returns has to be seen once
                with torch.no_grad(), self.weights(number):
                    output = kind.forward(self.modules[number], *args, **kwargs)
                self._returned[kind] = 0 if isinstance(output, Tensor) else len(output)
            count = self._returned[kind]
            return (hidden, *[None] * (count - 1)) if count else hidden

        for number, block in enumerate(self.modules):
            block.forward = partial(called, number)
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward


class _Stopped(Exception):  # noqa: N818 - no error
    """All that is wanted of a pass is known."""
