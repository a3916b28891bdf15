"""``target -> converter``. Installed packages add targets through the entry-point group ``acip_export.converters``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "acip_export.converters"

_BUILT_IN = {"gguf": "converters.gguf.converter", "onnx": "converters.onnx.converter"}


@dataclass(frozen=True)
class Progress:
    """One step of a long conversion: ``done`` of ``total`` bytes, now at tensor ``item``."""

    done: int
    total: int
    item: str


@dataclass(frozen=True)
class RunCommand:
    """How one program runs an export.

    Attributes:
        program: its name. language: of ``text``, as Markdown's fences call it: console, python, javascript, dockerfile.
        text: ready to copy. note: what else the program needs, or an empty string.
    """

    program: str
    language: str
    text: str
    note: str = ""


ProgressCallback = Callable[[Progress], None]


class Converter(Protocol):
    """What a target's module ``converter.py`` offers, as module-level functions.

    Prediction and conversion go through the same code for names, metadata and order, so that the prediction cannot
    drift from what is written.
    """

    def prepare(
        self, checkpoint: Checkpoint, backend: str, context: int, progress: ProgressCallback
    ) -> tuple[str, ...]:
        """What takes long and is the same for all plans of a model is done, and kept for the next time.

        Returns:
            What a user has to know about exports of this model, a sentence each.

        Raises:
            UnsupportedError, MissingExtraError: as :meth:`predict_files`.
        """
        ...

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> dict[str, int]:
        """Exact bytes of every file that :meth:`convert` will write, by path below the export directory.

        Raises:
            UnsupportedError: the architecture, tokenizer or a decision cannot be expressed.
            MissingExtraError: a package that the prediction needs is not installed.
        """
        ...

    def convert(self, bundle: Bundle, out: Path, progress: ProgressCallback) -> None:
        """Write the export into the existing, empty directory ``out``. Peak memory: a few of the largest tensor.

        Raises:
            UnsupportedError, MissingExtraError: as :meth:`predict_files`.
        """
        ...

    def round_trip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        """The numbers that :meth:`convert` stores, as the runtime reads them; see
        :class:`acip_export.rounding.RoundTrip`.
        """
        ...

    def quantizer(self) -> str:
        """Name and version of what :meth:`round_trip` rounds with: measured errors are good for no other."""
        ...

    def run_commands(self, plan: Plan, directory: Path) -> tuple[RunCommand, ...]:
        """For every program that runs the export within the plan's memory; the recommended one first."""
        ...


def converter(target: str) -> Converter:
    """The converter of a target.

    Raises:
        UnsupportedError: no such target.
    """
    module = _BUILT_IN.get(target)
    if module is not None:
        return import_module(module)  # a module satisfies the protocol
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == target:
            loaded: Converter = entry.load()
            return loaded
    raise UnsupportedError(f"no converter for {target!r}; known: {', '.join(sorted(_BUILT_IN))}")
