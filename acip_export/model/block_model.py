"""A causal language model whose numbers stay in their file: it computes one block at a time, with what is read for it.

A float32 copy of a large model has no room beside anything. So all texts pass through one block before the next one is
read, and what is kept between blocks is their hidden states. The matrix of the embedding is read where texts look up
rows of it, the head's in slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import CheckpointError
from acip_export.io.kept_work import Work
from acip_export.io.scratch import Scratch
from acip_export.model.block_chain import Arguments, BlockChain
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of, natural_key
from acip_export.model.torch_model import tied_names, untrained_model, without_weights
from acip_export.rounding.error_feedback import ROWS_AT_ONCE

# Numbers of the head's matrix that are read at once.
_SLICE = 1 << 22

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


class BlockModel(BlockChain):
    """A model without weights, and what it takes to compute a part of it with those that are handed in.

    Args:
        stored: where its numbers are.
        unable: what a model whose blocks are no chain cannot, and what to do instead.

    Attributes:
        model: the skeleton.
        parameters: names under which the parameters of each block are stored, and under ``""`` those of all else.
        embedding, head: names of the two large matrices; the same where one is stored for both.

    Raises:
        BundleError, CheckpointError: its tensors do not fit its architecture.
    """

    def __init__(self, stored: StoredModel, unable: str) -> None:
        self.stored = stored
        with without_weights():
            model = stored.skeleton()
        model.requires_grad_(False).eval()
        # Where each parameter is in the model.
        owners = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        buffers = {name for name, _ in model.named_buffers()}
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
        super().__init__(model, sorted(of_block.keys() - {""}, key=natural_key), unable)
        self.parameters: dict[str, list[str]] = {block: of_block.get(block, []) for block in (*self.names, "")}
        self._embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.embedding, self.head = self._name(self._embedding), self._name(self._head)

    @property
    def head_shape(self) -> tuple[int, int]:
        """Rows and columns of the head's matrix."""
        rows, columns = self._head.weight.shape
        return rows, columns

    def read_block(self, block: str) -> dict[str, Tensor]:
        """Read the weights of a block, by name."""
        return {name: self.stored.read(name) for name in self.parameters[block]}

    def weights(self, number: int) -> AbstractContextManager[None]:
        """See :class:`BlockChain`."""
        return self.filled(self.read_block(self.names[number]))

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
        with self.filled(outside):
            return self._entered(lambda: self.model(input_ids=ids, use_cache=False), stop=True)

    def leave(self, hidden: Tensor, ids: Tensor, outside: Mapping[str, Tensor], head: Rows | None = None) -> Tensor:
        """Return the logits (n, tokens, vocabulary) of texts of which ``hidden`` is what the last block returned.

        Args:
            ids: (n, tokens). outside: all that is in no block. head: reads the head's rows (see :func:`slices`);
                ``None``: it is in ``outside``.
        """
        with self.filled(outside), self.left(hidden), self._sliced_head(head):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def products(self, name: str) -> list[nn.Module]:
        """Return the linear layers that multiply with a stored matrix."""
        return [module for module, leaf in self._places[name] if leaf == "weight" and isinstance(module, nn.Linear)]

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


def slices(count: int, width: int) -> Iterator[slice]:
    """Yield the rows of a large matrix in pieces.

    They have as many rows as are rounded at once, or a multiple, so that they may have been kept.
    """
    step = max(1, _SLICE // (width * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rows_kept(read: Rows, shape: tuple[int, int], contents: str, work: Work | None = None) -> Rows:
    """Make all rows of a matrix now, into a file, and return what reads them: making takes longer.

    Args:
        shape: of the matrix. contents: what it is, for messages.
        work: has the file, perhaps with rows that were made before; ``None``: one without a name.

    Raises:
        OutputError: there is no room for it.
    """
    scratch = Scratch(None, contents) if work is None else work.scratch("rows")
    for part in slices(*shape):
        name = str(part.start)
        if work is None or name not in work:
            scratch.write(name, read(part).numpy())
            if work is not None:
                work.finish(name)
    return lambda rows: torch.from_numpy(scratch.read(str(rows.start)))


def _parameter(owner: tuple[nn.Module, str]) -> nn.Parameter | None:
    module, leaf = owner
    return module._parameters[leaf]
