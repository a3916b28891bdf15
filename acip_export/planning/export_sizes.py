"""Exact bytes of an export, for one model, format and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.budget import ModelMemory


class FilePrediction(Protocol):
    """The part of a format's :class:`acip_export.formats.registry.Converter` that planning needs."""

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> Mapping[str, int]:
        """Return the exact bytes of every file of the export, by path."""
        ...


@dataclass(frozen=True)
class ExportSizes:
    """What decisions take, to the byte.

    Attributes:
        converter: it predicts the files that it would write.
        memory: what the process takes beside them.
    """

    checkpoint: Checkpoint
    layout: str
    converter: FilePrediction
    memory: ModelMemory

    def files(self, tensors: tuple[TensorDecision, ...], serving: Serving) -> dict[str, int]:
        """Return the bytes of every file, by path."""
        return dict(self.converter.predict_files(self.checkpoint, self.layout, tensors, serving))

    def around(self, tensors: tuple[TensorDecision, ...], serving: Serving) -> int:
        """Return the bytes of the files that are not the tensors' own."""
        return sum(self.files(tensors, serving).values()) - sum(tensor.nbytes for tensor in tensors)
