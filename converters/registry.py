"""``target -> converter``. Installed packages add targets through the entry-point group ``acip_export.converters``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from acip_export.bundle import Bundle
from acip_export.checkpoint import Checkpoint
from acip_export.errors import UnsupportedError
from acip_export.plans import Plan, Runtime, TensorDecision

ENTRY_POINT_GROUP = "acip_export.converters"

_BUILT_IN = {"gguf": "converters.gguf.converter", "onnx": "converters.onnx.converter"}


@dataclass(frozen=True)
class Progress:
    """One step of a long conversion: ``done`` of ``total`` bytes, now at tensor ``item``."""

    done: int
    total: int
    item: str


ProgressCallback = Callable[[Progress], None]


class Converter(Protocol):
    """What a target's module ``converter.py`` offers, as module-level functions.

    Both functions go through the same code for names, metadata and order, so that the prediction cannot drift from
    what is written.
    """

    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], runtime: Runtime
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

    def command_lines(self, plan: Plan, directory: Path) -> list[str]:
        """Commands or code that run the export within the plan's memory, ready to copy."""
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
