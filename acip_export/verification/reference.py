"""The references that exports are compared with, materialized or dense, in PyTorch, float32, block by block.

A float32 copy of a large model has no room beside anything. So all windows pass through one block before the next one
is read, and what is kept between blocks is their hidden states; the head's matrix is read in slices. Every number is
read or made (and rounded) once, however many windows there are.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip_export.artifacts.materialized import (
    MaterializedModel,
    check_names,
    rounded_tensor,
    stored_types,
    untrained,
)
from acip_export.errors import CheckpointError, OutputError, UnsupportedError
from acip_export.formats.session import Logits, Tokens
from acip_export.io.atomic import new_file
from acip_export.io.kept_states import KeptStates
from acip_export.io.prefetch import one_ahead
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import block_of, natural_key
from acip_export.model.torch_model import tied_names, untrained_model, without_weights
from acip_export.rounding.error_feedback import ROWS_AT_ONCE
from acip_export.rounding.quantizer import RoundTrip
from acip_export.verification.unfinished import Unfinished, digest_of

# Numbers of the head's matrix that are read at once.
_SLICE = 1 << 22
# Tokens of the text that tells how a block returns its hidden states.
_FEW = 2

# What a block is called with, hidden states left out.
_Rest = tuple[tuple[Any, ...], dict[str, Any]]


class StoredModel(ABC):
    """A model whose numbers stay in their file until they are asked for."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The model, its parameters without memory, in evaluation mode."""

    @abstractmethod
    def read(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in float32."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Of all tensors that are stored."""

    @abstractmethod
    def check(self, missing: set[str], unexpected: set[str]) -> None:
        """Refuse a model that does not fit its architecture."""

    def rows(self, name: str) -> Callable[[slice], Tensor]:
        """Read slices of a large matrix (see :func:`_slices`) again and again."""
        return lambda rows: self.read(name, rows)


class StoredCheckpoint(StoredModel):
    """A dense model."""

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


class StoredReference(StoredModel):
    """A materialized model with the numbers of its export.

    Args:
        round_trip: as :func:`acip_export.artifacts.materialized.load_materialized`.
    """

    def __init__(self, model: MaterializedModel, round_trip: RoundTrip | None) -> None:
        self.model, self.round_trip = model, round_trip
        self.types = stored_types(model.plan)
        self._rounded: dict[str, IO[bytes]] = {}

    def skeleton(self) -> nn.Module:
        """See :class:`StoredModel`."""
        return untrained(self.model)

    def read(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """See :class:`StoredModel`. Rows are rounded independently of each other."""
        return rounded_tensor(self.model, name, self.types, self.round_trip, rows)

    @property
    def names(self) -> frozenset[str]:
        """See :class:`StoredModel`."""
        return frozenset(self.model.shapes)

    def check(self, missing: set[str], unexpected: set[str]) -> None:
        """Raises BundleError or CheckpointError."""
        check_names(self.model, missing, unexpected)

    def rows(self, name: str) -> Callable[[slice], Tensor]:
        """Round all rows now, into a file without a name: rounding takes longer than reading."""
        count, width = self.model.shapes[name]
        if name not in self._rounded:
            self._rounded[name] = self._written(self.read(name, part) for part in _slices(count, width))
        file = self._rounded[name]

        def read(rows: slice) -> Tensor:
            found = torch.empty(rows.stop - rows.start, width)
            file.seek(rows.start * width * found.element_size())
            file.readinto(found.numpy().reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
            return found

        return read

    def _written(self, parts: Iterable[Tensor]) -> IO[bytes]:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        weakref.finalize(self, file.close)
        try:
            for part in parts:
                file.write(part.contiguous().numpy().data)
            file.flush()
        except OSError as reason:
            raise OutputError(
                f"{tempfile.gettempdir()} has no room for a rounded head: {reason.strerror}. Make room there, or "
                "choose another place with  TMPDIR=DIR"
            ) from reason
        return file


def _nothing() -> None:
    pass


def open_reference(model: MaterializedModel, round_trip: RoundTrip | None) -> Reference:
    """The reference for a materialized model's export."""
    return Reference(StoredReference(model, round_trip))


def pass_dense(
    path: Path,
    windows: Sequence[Tokens],
    cache: Path | None = None,
    passed_block: Callable[[], None] = _nothing,
    unfinished: Unfinished | None = None,
) -> Passed:
    """Take windows through a dense model, or read what the last block made of them when it was done before.

    Args:
        cache: directory of hidden states, read and filled: far smaller than logits, and exact.
        passed_block: called after each block.
        unfinished: keeps a pass that is not done.
    """
    stored = StoredCheckpoint(Checkpoint.open(path))
    reference = Reference(stored)
    origin = f"{stored.checkpoint.fingerprint} {digest_of(windows)}"

    def passed() -> Passed:
        kept = None if unfinished is None else unfinished.states("dense model", origin, "block")
        return reference.passed(windows, passed_block, kept)

    if cache is None:
        return passed()
    file = cache / f"dense-{hashlib.sha256(origin.encode()).hexdigest()}.safetensors"
    names = [str(index) for index in range(len(windows))]
    known = _read_states(file)
    if known is None or [len(known.get(name, ())) for name in names] != list(map(len, windows)):
        made = passed()
        cache.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            save_file(
                {name: states[0].contiguous() for name, states in zip(names, made.hidden, strict=True)}, temporary
            )
        return made
    for _ in reference.blocks:
        passed_block()
    return Passed(reference, tuple(windows), tuple(known[name][None] for name in names))


def _read_states(file: Path) -> dict[str, Tensor] | None:
    """What a cache has; ``None``: nothing, or something damaged."""
    try:
        found: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError):
        return None
    return found if all(bool(torch.isfinite(states).all()) for states in found.values()) else None


class _Stopped(Exception):  # noqa: N818 - no error
    """The forward pass has come to where the last block would compute."""


class Reference:
    """A causal language model that takes windows through one block after the other.

    Peak memory: two blocks (one computes while the next is read) or a slice of the head, hidden states of all windows,
    and the logits of one.

    Raises:
        BundleError, CheckpointError: its tensors do not fit its architecture.
        UnsupportedError: a block reads something else than the hidden states that the block before it returns.
    """

    def __init__(self, stored: StoredModel) -> None:
        self.stored = stored
        with without_weights():
            self.model = stored.skeleton()
        self.model.requires_grad_(False).eval()
        owners = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in self.model.named_modules()
            for name in module._parameters
            if module._parameters[name] is not None
        }
        buffers = {name for name, _ in self.model.named_buffers()}
        shared = {id(_parameter(owners[name])): name for name in owners if name in stored.names}
        # A tied head, say, is stored under the embedding's name alone.
        self._stored_as = {name: shared.get(id(_parameter(owner)), name) for name, owner in owners.items()}
        missing = {name for name, stored_as in self._stored_as.items() if stored_as not in stored.names}
        stored.check(missing, set(stored.names - owners.keys() - buffers))
        self._owners = owners
        self._wrap: Callable[[Tensor], Any] | None = None
        self._embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        self._head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        self._blocks: dict[str, list[str]] = {}
        self._outside: list[str] = []
        for name in owners:
            block = block_of(name)
            (self._outside if block is None else self._blocks.setdefault(block, [])).append(name)
        self._names = sorted(self._blocks, key=natural_key)
        self._modules = [self.model.get_submodule(name) for name in self._names]

    @property
    def blocks(self) -> Sequence[str]:
        """Names of its blocks, in their order."""
        return self._names

    @torch.no_grad()
    def passed(
        self,
        windows: Sequence[Tokens],
        passed_block: Callable[[], None] = _nothing,
        kept: KeptStates | None = None,
    ) -> Passed:
        """Take windows through all blocks, calling ``passed_block`` after each.

        Args:
            kept: of the same model and windows, read and filled: blocks that are behind are left out.
        """
        entered = self._enter(windows)
        hidden = [states for states, _ in entered]
        behind = kept.blocks if kept is not None else 0
        if kept is not None and behind:
            states = kept.restored()
            hidden = [states[str(index)] for index in range(len(hidden))]
        for _ in range(behind):
            passed_block()
        for number, (_, tensors) in enumerate(one_ahead(self._read_block, self._names[behind:]), behind):
            block = self._modules[number]
            with self._filled(tensors):
                for index, (_, arguments) in enumerate(entered):
                    args, kwargs = arguments[number]
                    hidden[index] = _hidden_of(block(hidden[index], *args, **kwargs))
            if kept is not None:
                kept.passed(number + 1, {str(index): states for index, states in enumerate(hidden)})
            passed_block()
        return Passed(self, tuple(windows), tuple(hidden))

    @torch.no_grad()
    def scores(self, windows: Sequence[Tokens], hidden: Sequence[Tensor]) -> Iterator[Logits]:
        """Logits of windows, of which ``hidden`` (1, tokens, width) is what the last block returned."""
        tensors = self._read_outside()
        # What is looked up is forgotten where the last block's states take the place of what was computed from it.
        tensors[self._name(self._embedding)] = torch.empty_like(self._embedding.weight, device="cpu")
        rows = self.stored.rows(self._stored_as[self._name(self._head)])
        with self._filled(tensors), self._sliced_head(rows):
            self._learn(_ids(windows[0][:_FEW]))
            for window, states in zip(windows, hidden, strict=True):
                with self._replaced(states):
                    logits: Logits = self.model(input_ids=_ids(window), use_cache=False).logits[0].float().numpy()
                yield logits
                del logits  # before the next window's are made

    def _enter(self, windows: Sequence[Tokens]) -> list[tuple[Tensor, list[_Rest]]]:
        """For each window, what enters the first block, and what all blocks are called with beside it."""
        tensors, embedding = self._read_outside(), self._name(self._embedding)
        # Rows that no window has are never touched, and take no memory.
        tensors[embedding] = torch.empty_like(self._embedding.weight, device="cpu")
        used = torch.from_numpy(np.unique(np.concatenate([np.asarray(window) for window in windows])))
        tensors[embedding][used] = self.stored.read(self._stored_as[embedding], used)
        with self._filled(tensors):
            self._learn(_ids(windows[0][:_FEW]))
            return [self._arguments(_ids(window)) for window in windows]

    def _learn(self, ids: Tensor) -> None:
        """Find out how blocks return hidden states: alone, or as the first of several things."""
        if self._wrap is not None:
            return
        found: list[Any] = []

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output)
            raise _Stopped

        handle = self._modules[0].register_forward_hook(hook)
        with self._filled(self._read_block(self._names[0])), suppress(_Stopped):
            self.model(input_ids=ids, use_cache=False)
        handle.remove()
        output = found[0]
        self._wrap = (lambda hidden: hidden) if isinstance(output, Tensor) else (lambda hidden: (hidden, *output[1:]))

    def _returned(self, hidden: Tensor) -> Any:
        """As a block returns it."""
        assert self._wrap is not None
        return self._wrap(hidden)

    def _arguments(self, ids: Tensor) -> tuple[Tensor, list[_Rest]]:
        entered: list[Tensor] = []
        arguments: list[_Rest] = []

        def pass_on(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = _split(args, kwargs)
                if number and not (entered and hidden is entered[0]):
                    raise UnsupportedError(
                        f"{self._names[number]} does not read what {self._names[number - 1]} returns; a model whose "
                        "blocks are no chain cannot be a reference. Export without verifying:  --no-verify"
                    )
                entered[:] = [hidden]
                arguments.append(rest)
                if number == len(self._names) - 1:
                    raise _Stopped
                return self._returned(hidden)

            return forward

        with self._computing(pass_on), suppress(_Stopped):
            self.model(input_ids=ids, use_cache=False)
        return entered[0], arguments

    @contextmanager
    def _replaced(self, states: Tensor) -> Iterator[None]:
        """Let blocks compute nothing, and the last one return ``states``."""

        def pass_on(number: int) -> Callable[..., Any]:
            last = number == len(self._names) - 1
            return lambda *args, **kwargs: self._returned(states if last else _split(args, kwargs)[0])

        with self._computing(pass_on):
            yield

    @contextmanager
    def _computing(self, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        for number, block in enumerate(self._modules):
            block.forward = forward_of(number)
        try:
            yield
        finally:
            for block in self._modules:
                del block.forward

    @contextmanager
    def _sliced_head(self, rows: Callable[[slice], Tensor]) -> Iterator[None]:
        """Multiply with the head a slice of its rows at a time."""
        head = self._head

        def forward(hidden: Tensor) -> Tensor:
            count, width = head.weight.shape
            found = hidden.new_empty((*hidden.shape[:-1], count))
            for part in _slices(count, width):
                bias = None if head.bias is None else head.bias[part]
                found[..., part] = nn.functional.linear(hidden, rows(part), bias)
            return found

        head.forward = forward
        try:
            yield
        finally:
            del head.forward

    @contextmanager
    def _filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters their numbers for a while."""
        empty = {name: _parameter(self._owners[name]) for name in tensors}
        for name, tensor in tensors.items():
            module, leaf = self._owners[name]
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            for name, parameter in empty.items():
                module, leaf = self._owners[name]
                module._parameters[leaf] = parameter

    def _read_block(self, block: str) -> dict[str, Tensor]:
        return {name: self.stored.read(self._stored_as[name]) for name in self._blocks[block]}

    def _read_outside(self) -> dict[str, Tensor]:
        """What is in no block, without the two large matrices."""
        large = self._name(self._embedding), self._name(self._head)
        return {name: self.stored.read(self._stored_as[name]) for name in self._outside if name not in large}

    def _name(self, module: nn.Module) -> str:
        """Of a module's weight."""
        return next(name for name, owner in self._owners.items() if owner == (module, "weight"))


def _parameter(owner: tuple[nn.Module, str]) -> nn.Parameter | None:
    module, leaf = owner
    return module._parameters[leaf]


@dataclass(frozen=True)
class Passed:
    """Windows that went through all blocks of a reference.

    Attributes:
        hidden: what the last block returned of each, (1, tokens, width).
    """

    reference: Reference
    windows: tuple[Tokens, ...]
    hidden: tuple[Tensor, ...]

    def logits(self, start: int = 0, stop: int | None = None) -> Iterator[Logits]:
        """Of the windows from ``start`` to ``stop``: float32 (tokens, vocabulary) each."""
        return self.reference.scores(self.windows[start:stop], self.hidden[start:stop])


def _ids(window: Tokens) -> Tensor:
    return torch.from_numpy(np.asarray(window, np.int64))[None]


def _slices(count: int, width: int) -> Iterator[slice]:
    """Rows of the head in pieces, of as many rows as are rounded at once or a multiple: so they may have been kept."""
    step = max(1, _SLICE // (width * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Rest]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {name: value for name, value in kwargs.items() if name != "hidden_states"})


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
