"""A causal language model whose numbers stay in their file: it computes one block at a time, with what is read for it.

A float32 copy of a large model has no room beside anything. So all texts pass through one block before the next one is
read, and what is kept between blocks is their hidden states. The matrix of the embedding is read where texts look up
rows of it, the head's in slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import CheckpointError, UnsupportedError
from acip_export.io.scratch import Scratch
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of, natural_key
from acip_export.model.torch_model import tied_names, untrained_model, without_weights
from acip_export.rounding.error_feedback import ROWS_AT_ONCE

# Numbers of the head's matrix that are read at once.
_SLICE = 1 << 22
# Tokens of the text that tells how a block returns its hidden states.
_FEW = 2

# What a block is called with, hidden states left out.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Reads some rows of a matrix, float32.
Rows = Callable[[slice], Tensor]


class StoredModel(ABC):
    """A model whose numbers stay in their file until they are asked for."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """Make the model in evaluation mode; its parameters may be without memory."""

    @abstractmethod
    def read(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """Read a tensor, or some of its rows, in float32."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of all tensors that are stored."""

    @abstractmethod
    def check(self, missing: set[str], unexpected: set[str]) -> None:
        """Refuse a model that does not fit its architecture."""

    def rows(self, name: str) -> Rows:
        """Return what reads slices of a large matrix (see :func:`slices`) again and again."""
        return lambda rows: self.read(name, rows)


class StoredCheckpoint(StoredModel):
    """The dense model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def skeleton(self) -> nn.Module:
        """See :class:`StoredModel`."""
        return untrained_model(self.checkpoint.config)

    def read(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """See :class:`StoredModel`."""
        tensor = self.checkpoint.read(name)
        return (tensor if rows is None else tensor[rows]).float()

    @property
    def names(self) -> frozenset[str]:
        """See :class:`StoredModel`."""
        return frozenset(self.checkpoint.tensors)

    def check(self, missing: set[str], unexpected: set[str]) -> None:
        """Raises CheckpointError."""
        absent = missing - tied_names(self.checkpoint)
        if absent or unexpected:
            raise CheckpointError(
                f"{self.checkpoint.path} does not fit its config.json: missing {sorted(absent)[:3]}, "
                f"unexpected {sorted(unexpected)[:3]}"
            )


class BlockModel:
    """A model without weights, and what it takes to compute a part of it with those that are handed in.

    Args:
        stored: where its numbers are.
        unable: what a model whose blocks are no chain cannot, and what to do instead.

    Attributes:
        model: the skeleton.
        names: of its blocks, in the order in which they compute; ``modules`` are they themselves.
        parameters: names under which the parameters of each block are stored, and under ``""`` those of all else.
        embedding, head: names of the two large matrices; the same where one is stored for both.

    Raises:
        BundleError, CheckpointError: its tensors do not fit its architecture.
    """

    def __init__(self, stored: StoredModel, unable: str) -> None:
        self.stored, self._unable = stored, unable
        with without_weights():
            self.model = stored.skeleton()
        self.model.requires_grad_(False).eval()
        # Where each parameter is in the model.
        owners = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in self.model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        buffers = {name for name, _ in self.model.named_buffers()}
        shared = {id(_parameter(owners[name])): name for name in owners if name in stored.names}
        # A tied head, say, is stored under the embedding's name alone.
        stored_as = {name: shared.get(id(_parameter(owner)), name) for name, owner in owners.items()}
        missing = {name for name, found in stored_as.items() if found not in stored.names}
        stored.check(missing, set(stored.names - owners.keys() - buffers))
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, owner in owners.items():
            self._places.setdefault(stored_as[name], []).append(owner)
        of_block: dict[str, list[str]] = {}
        for name in self._places:
            of_block.setdefault(block_of(name) or "", []).append(name)
        self.names = sorted(of_block.keys() - {""}, key=natural_key)
        self.parameters: dict[str, list[str]] = {block: of_block.get(block, []) for block in (*self.names, "")}
        self.modules = [self.model.get_submodule(name) for name in self.names]
        self._embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        self._head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        self.embedding, self.head = self._name(self._embedding), self._name(self._head)
        self._wrap: Callable[[Tensor], Any] | None = None

    @property
    def head_shape(self) -> tuple[int, int]:
        """Rows and columns of the head's matrix."""
        rows, columns = self._head.weight.shape
        return rows, columns

    def read_block(self, block: str) -> dict[str, Tensor]:
        """Read the weights of a block, by name."""
        return {name: self.stored.read(name) for name in self.parameters[block]}

    def read_outside(self) -> dict[str, Tensor]:
        """Read what is in no block, without the two large matrices, in whose place there are numbers of no meaning.

        They take no memory, for nobody reads them.
        """
        large = {self.embedding, self.head}
        found = {name: self.stored.read(name) for name in self.parameters[""] if name not in large}
        found[self.embedding] = torch.empty(self._embedding.weight.shape)
        return found

    def looked_up(self, ids: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the embedding's matrix with the rows that texts look up; all others are of no meaning.

        Args:
            read: reads rows of another one; ``None``: of the stored one.
        """
        matrix = torch.empty(self._embedding.weight.shape)
        used = torch.unique(ids)
        matrix[used] = self.stored.read(self.embedding, used) if read is None else read(used)
        return matrix

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters their numbers for a while; gradients pass through to what was handed in."""
        before = [(*place, _parameter(place)) for name in tensors for place in self._places[name]]
        for name, tensor in tensors.items():
            for module, leaf in self._places[name]:
                module._parameters[leaf] = tensor  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, leaf, parameter in before:
                module._parameters[leaf] = parameter

    def enter(self, ids: Tensor, outside: Mapping[str, Tensor]) -> tuple[Tensor, list[Arguments]]:
        """Return what the first block reads, and what all blocks are called with beside hidden states.

        Args:
            ids: (n, tokens). outside: all that is in no block.

        Raises:
            UnsupportedError: a block reads something else than what the block before it returns.
        """
        entered: list[Tensor] = []
        arguments: list[Arguments] = []

        def pass_on(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = split_arguments(args, kwargs)
                if number and not (entered and hidden is entered[0]):
                    raise UnsupportedError(
                        f"{self.names[number]} does not read what {self.names[number - 1]} returns; a model whose "
                        f"blocks are no chain cannot {self._unable}"
                    )
                entered[:] = [hidden]
                arguments.append(rest)
                if number == len(self.names) - 1:
                    raise _Stopped
                return self._returned(hidden)

            return forward

        with self.filled(outside):
            self._learn(ids)
            with self._computing(pass_on), suppress(_Stopped):
                self.model(input_ids=ids, use_cache=False)
        return entered[0], arguments

    def run(self, number: int, hidden: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        """Compute a block of what enters it; it has to be filled."""
        args, kwargs = arguments[number]
        return hidden_of(self.modules[number](hidden, *args, **kwargs))

    def leave(self, hidden: Tensor, ids: Tensor, outside: Mapping[str, Tensor], head: Rows | None = None) -> Tensor:
        """Return the logits (n, tokens, vocabulary) of texts of which ``hidden`` is what the last block returned.

        Args:
            ids: (n, tokens). outside: all that is in no block. head: reads the head's rows (see :func:`slices`);
                ``None``: it is in ``outside``.
        """

        def pass_on(number: int) -> Callable[..., Any]:
            last = number == len(self.names) - 1
            return lambda *args, **kwargs: self._returned(hidden if last else split_arguments(args, kwargs)[0])

        with self.filled(outside):
            self._learn(ids)
            with self._computing(pass_on), self._sliced_head(head):
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def products(self, name: str) -> list[nn.Module]:
        """Return the linear layers that multiply with a stored matrix."""
        return [module for module, leaf in self._places[name] if leaf == "weight" and isinstance(module, nn.Linear)]

    @torch.no_grad()
    def _learn(self, ids: Tensor) -> None:
        """Find out how blocks return hidden states: alone, or as the first of several things."""
        if self._wrap is not None:
            return
        found: list[Any] = []

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output)
            raise _Stopped

        handle = self.modules[0].register_forward_hook(hook)
        with self.filled(self.read_block(self.names[0])), suppress(_Stopped):
            self.model(input_ids=ids[:1, :_FEW], use_cache=False)
        handle.remove()
        output = found[0]
        self._wrap = (lambda hidden: hidden) if isinstance(output, Tensor) else (lambda hidden: (hidden, *output[1:]))

    def _returned(self, hidden: Tensor) -> Any:
        """Return hidden states as a block does."""
        assert self._wrap is not None
        return self._wrap(hidden)

    @contextmanager
    def _computing(self, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Let the blocks do something else."""
        for number, block in enumerate(self.modules):
            block.forward = forward_of(number)
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward

    @contextmanager
    def _sliced_head(self, rows: Rows | None) -> Iterator[None]:
        """Multiply with the head a slice of its rows at a time."""
        if rows is None:
            yield
            return
        head, read = self._head, rows

        def forward(hidden: Tensor) -> Tensor:
            found = hidden.new_empty((*hidden.shape[:-1], len(head.weight)))
            for part in slices(*self.head_shape):
                bias = None if head.bias is None else head.bias[part]
                found[..., part] = nn.functional.linear(hidden, read(part), bias)
            return found

        head.forward = forward
        try:
            yield
        finally:
            del head.forward

    def _name(self, module: nn.Module) -> str:
        """Return the name under which a module's weight is stored."""
        return next(name for name, places in self._places.items() if (module, "weight") in places)


class _Stopped(Exception):  # noqa: N818 - no error
    """All that is wanted of a pass is known."""


def slices(count: int, width: int) -> Iterator[slice]:
    """Yield the rows of a large matrix in pieces.

    They have as many rows as are rounded at once, or a multiple, so that they may have been kept.
    """
    step = max(1, _SLICE // (width * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rows_kept(read: Rows, shape: tuple[int, int], contents: str) -> Rows:
    """Make all rows of a matrix now, into a file without a name, and return what reads them: making takes longer.

    Args:
        shape: of the matrix. contents: what it is, for messages.

    Raises:
        OutputError: there is no room for it.
    """
    scratch = Scratch(None, contents)
    for part in slices(*shape):
        scratch.write(str(part.start), read(part).numpy())
    return lambda rows: torch.from_numpy(scratch.read(str(rows.start)))


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {name: value for name, value in kwargs.items() if name != "hidden_states"})


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states among what a block returns."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _parameter(owner: tuple[nn.Module, str]) -> nn.Parameter | None:
    module, leaf = owner
    return module._parameters[leaf]
