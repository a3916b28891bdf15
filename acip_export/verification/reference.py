"""The references that exports are compared with, materialized or dense, in PyTorch, float32, block by block.

Every number is read or made (and rounded) once, however many windows there are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from acip_export.errors import OutputError
from acip_export.finite import is_finite
from acip_export.formats.session import Logits, Tokens
from acip_export.io.atomic import new_file
from acip_export.io.kept_states import KeptStates
from acip_export.io.prefetch import one_ahead
from acip_export.model.block_model import BlockModel, Rows, StoredCheckpoint, StoredModel, rows_kept
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.quantizer import RoundTrip
from acip_export.verification.unfinished import Unfinished, digest_of

logger = logging.getLogger(__name__)


class StoredReference(StoredModel):
    """A materialized model with the numbers of its export.

    Args:
        round_trip: as :func:`acip_export.artifacts.materialized.load_materialized`.
        unfinished: keeps a rounded head that is not whole.
    """

    def __init__(
        self, model: MaterializedModel, round_trip: RoundTrip | None, unfinished: Unfinished | None = None
    ) -> None:
        self.model, self.round_trip, self._unfinished = model, round_trip, unfinished
        self.types = stored_types(model.plan)
        self._rounded: dict[str, Rows] = {}

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

    def rows(self, name: str) -> Rows:
        """Round all rows now."""
        if name not in self._rounded:
            self._rounded[name] = self._round(super().rows(name), self.model.shapes[name])
        return self._rounded[name]

    def _round(self, rows: Rows, shape: tuple[int, ...]) -> Rows:
        what, work = "a rounded head", None if self._unfinished is None else self._unfinished.work("rounded head")
        count, width = shape
        try:
            return rows_kept(rows, (count, width), what, work)
        except OutputError as reason:
            if work is None:
                raise
            logger.warning(
                "%s is not kept (%s); a process that is killed starts again", what, reason.__cause__ or reason
            )
        return rows_kept(rows, (count, width), what)


def _nothing() -> None:
    pass


def open_reference(
    model: MaterializedModel, round_trip: RoundTrip | None, unfinished: Unfinished | None = None
) -> Reference:
    """Return the reference for a materialized model's export; ``unfinished`` keeps a rounded head."""
    return Reference(StoredReference(model, round_trip, unfinished))


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
    return found if all(map(is_finite, found.values())) else None


class Reference:
    """A causal language model that takes windows through one block after the other.

    Peak memory: two blocks (one computes while the next is read) or a slice of the head, hidden states of all windows,
    and the logits of one.

    Raises:
        BundleError, CheckpointError: its tensors do not fit its architecture.
    """

    def __init__(self, stored: StoredModel) -> None:
        self._model = BlockModel(stored, "be a reference. Export without verifying:  --no-verify")

    @property
    def blocks(self) -> Sequence[str]:
        """Names of its blocks, in their order."""
        return self._model.names

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

        Raises:
            UnsupportedError: a block reads something else than the hidden states that the block before it returns.
        """
        model = self._model
        outside = model.read_outside()
        outside[model.embedding] = model.looked_up(torch.cat([_ids(window)[0] for window in windows]))
        entered = [model.enter(_ids(window), outside) for window in windows]
        del outside
        hidden = [states for states, _ in entered]
        behind = kept.blocks if kept is not None else 0
        if kept is not None and behind:
            states = kept.restored()
            hidden = [states[str(index)] for index in range(len(hidden))]
        for _ in range(behind):
            passed_block()
        for number, (_, tensors) in enumerate(one_ahead(model.read_block, model.names[behind:]), behind):
            with model.filled(tensors):
                for index, (_, arguments) in enumerate(entered):
                    hidden[index] = model.run(number, hidden[index], arguments)
            if kept is not None:
                kept.passed(number + 1, {str(index): states for index, states in enumerate(hidden)})
            passed_block()
        return Passed(self, tuple(windows), tuple(hidden))

    @torch.no_grad()
    def scores(self, windows: Sequence[Tokens], hidden: Sequence[Tensor]) -> Iterator[Logits]:
        """Yield the logits of windows, of which ``hidden`` (1, tokens, width) is what the last block returned."""
        model = self._model
        outside, rows = model.read_outside(), model.stored.rows(model.head)
        for window, states in zip(windows, hidden, strict=True):
            logits: Logits = model.leave(states, _ids(window), outside, rows)[0].float().numpy()
            yield logits
            del logits  # before the next window's are made


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
