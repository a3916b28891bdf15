"""Exact bytes of an export, for one model, format and layout."""

from __future__ import annotations

from dataclasses import dataclass

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.planning.memory import ModelMemory


@dataclass(frozen=True)
class ExportSizes:
    """What decisions take, to the byte.

    Attributes:
        memory: what the process takes beside the files, for the model and format that they are of.
        layout: the name of the layout.
    """

    memory: ModelMemory
    layout: str

    def files(self, tensors: tuple[TensorDecision, ...], serving: Serving) -> dict[str, int]:
        """Return the bytes of every file, by path."""
        memory = self.memory
        return memory.format.predict_files(memory.checkpoint, self.layout, tensors, serving)

    def around(self, tensors: tuple[TensorDecision, ...], serving: Serving) -> int:
        """Return the bytes of the files that are not the tensors' own."""
        return sum(self.files(tensors, serving).values()) - sum(tensor.nbytes for tensor in tensors)
