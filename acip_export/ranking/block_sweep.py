"""Go forward and backward through a model block by block: memory holds the activations of one block and one batch.

Forward, what enters each block is kept in a scratch file, batch by batch. Backward, from the last block to the first,
each block is computed again for all batches, with gradients: whoever measures something in a block has all of the text
pass through it, and can be done with it before the next. That costs one forward pass more than to keep all activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acip_export.errors import UnsupportedError
from acip_export.io.scratch import Scratch
from acip_export.progress import Clock, ProgressCallback
from acip_export.ranking.processes import Processes

# Work of a window in one block, backward, as a multiple of what it is forward: for the time left.
_BACKWARD = 3

# Runs the model on a batch, sums a loss and takes it backward; returns it by what the task counts.
Tail = Callable[[int, Tensor], float]


@dataclass
class _Batch:
    """Hold what is known of one batch between the two directions.

    Attributes:
        windows: the batch.arguments: of every block, hidden states left out. embedded: what entered the first block, as
            a function of the embedding's output.
    """

    windows: Tensor
    dtype: torch.dtype = torch.float32
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    embedded: Tensor | None = None


class BlockSweep:
    """Take batches through a model whose parameters want no gradients.

    Args:
        blocks: names of the model's blocks, in the order in which they compute. directory: for the scratch file.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], processes: Processes, directory: Path | None = None
    ) -> None:
        self.model, self.names, self.processes, self.directory = model, list(blocks), processes, directory
        self.blocks = [model.get_submodule(name) for name in blocks]

    @contextmanager
    def run(
        self, stage: str, batches: Sequence[tuple[int, Tensor]], windows: int, tail: Tail, progress: ProgressCallback
    ) -> Iterator[Iterator[tuple[str, Iterator[tuple[Tensor, Callable[[], None]]]]]]:
        """Go forward; yield the blocks from the last to the first, each with its batches and what takes them backward.

        All of a block's batches have to be taken backward, in order, before the next block is asked for.

        Args:
            batches: of this process, with the index of each one's first window. windows: of all processes.
        """
        depth, count = len(self.blocks), self.processes.count
        length = batches[0][1].shape[1]
        unit = depth * (1 + _BACKWARD)
        clock = Clock(stage, windows * unit, progress, tokens=length / unit)
        scratch = Scratch(self.directory)
        try:
            known = []
            for index, (first, part) in enumerate(batches):
                known.append(_Batch(part))
                loss = self._forward(index, known[-1], scratch, partial(tail, first, part))
                clock.advance(len(part) * count * depth, loss=loss)

            def backward(number: int) -> Iterator[tuple[Tensor, Callable[[], None]]]:
                for index, batch in enumerate(known):
                    yield batch.windows, partial(self._backward, number, index, batch, scratch)
                    clock.advance(len(batch.windows) * count * _BACKWARD)

            yield ((self.names[number], backward(number)) for number in reversed(range(depth)))
        finally:
            scratch.close()

    def _forward(self, index: int, batch: _Batch, scratch: Scratch, tail: Callable[[], float]) -> float:
        """Run ``tail``, keep what enters the blocks, and the gradient of what leaves the last one."""
        handles: list[Any] = []
        left: list[Tensor] = []
        last: list[Tensor] = []

        def enter(number: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden, rest = _split(args, kwargs)
                if number == 0:
                    batch.embedded, batch.dtype = hidden, hidden.dtype
                elif hidden is not left[-1]:
                    raise UnsupportedError(
                        f"{self.names[number]} does not read what {self.names[number - 1]} returns; a model whose "
                        "blocks are no chain cannot be ranked"
                    )
                hidden = hidden.detach()
                scratch.write(f"{number}/{index}", _stored(hidden))
                batch.arguments.append(rest)
                return _joined(hidden, rest)

            return hook

        def leave(number: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                if number < len(self.blocks) - 1:
                    left[:] = [_hidden_of(output)]
                    return output
                last.append(_hidden_of(output).detach().requires_grad_())
                return last[0] if isinstance(output, Tensor) else (last[0], *output[1:])

            return hook

        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(enter(number), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(number)))
        try:
            loss = tail()
        finally:
            for handle in handles:
                handle.remove()
        (leaf,) = last
        assert leaf.grad is not None
        scratch.write(f"gradient/{index}", _stored(leaf.grad))
        return loss

    def _backward(self, number: int, index: int, batch: _Batch, scratch: Scratch) -> None:
        hidden = _restored(scratch.read(f"{number}/{index}"), batch).requires_grad_()
        args, kwargs = _joined(hidden, batch.arguments[number])
        output = _hidden_of(self.blocks[number](*args, **kwargs))
        output.backward(_restored(scratch.read(f"gradient/{index}"), batch))  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        if number:
            scratch.write(f"gradient/{index}", _stored(hidden.grad))
            return
        assert batch.embedded is not None
        if batch.embedded.requires_grad:
            batch.embedded.backward(hidden.grad)  # type: ignore[no-untyped-call]
        batch.embedded = None


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def _joined(hidden: Tensor, rest: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (hidden, *rest[0]), rest[1]


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _stored(tensor: Tensor) -> np.ndarray:
    # As bytes: numpy has no bfloat16.
    array: np.ndarray = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return array


def _restored(array: np.ndarray, like: _Batch) -> Tensor:
    return torch.from_numpy(array).view(like.dtype).to(like.windows.device)
