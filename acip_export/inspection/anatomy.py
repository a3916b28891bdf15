"""The anatomy of a model: tensors, bytes, and what is neither. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from acip_export.artifacts.names import ANATOMY
from acip_export.errors import ModelFileError
from acip_export.model.tensor_names import without_numbers

Kind = Literal["gguf", "onnx", "safetensors", "model", "bundle", "export", "scores", "plan"]

_LONGEST_FACT = 200


@dataclass(frozen=True)
class TensorPart:
    """One stored tensor.

    Attributes:
        name: unique in its anatomy.
        shape: extents as the format writes them, the slowest first (``(out, in)`` for a linear weight).
        type: of the stored numbers, in the format's own words: ``q4_k``, ``BF16``, ``float16``.
        nbytes: bytes that it takes in its file; 0 for a second name of bytes that are counted already.
        file: path of that file below the anatomy's root.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    file: str


@dataclass(frozen=True)
class Share:
    """A group of tensors: how many, and their bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Anatomy:
    """All bytes of a model file or directory.

    Attributes:
        path: as it was given.
        kind: what was found there.
        files: bytes by path below the root (by file name for a single file). For a plan: as planned.
        tensors: in file order.
        facts: metadata worth showing, as text.
    """

    path: str
    kind: Kind
    files: Mapping[str, int]
    tensors: tuple[TensorPart, ...]
    facts: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def overhead_bytes(self) -> int:
        """Bytes that are no tensor: headers, metadata, tokenizer, graph, padding, other files."""
        return self.total_bytes - self.tensor_bytes

    def by_group(self) -> tuple[Share, ...]:
        """Tensors that differ only in their layer number together, largest group first."""
        return self._shares(lambda tensor: without_numbers(tensor.name))

    def by_type(self) -> tuple[Share, ...]:
        return self._shares(lambda tensor: tensor.type)

    def largest(self, count: int) -> tuple[TensorPart, ...]:
        return tuple(sorted(self.tensors, key=lambda tensor: (-tensor.nbytes, tensor.name))[:count])

    def _shares(self, key: Callable[[TensorPart], str]) -> tuple[Share, ...]:
        counts: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            number, size = counts.get(key(tensor), (0, 0))
            counts[key(tensor)] = number + 1, size + tensor.nbytes
        shares = [Share(name, number, size) for name, (number, size) in counts.items()]
        return tuple(sorted(shares, key=lambda share: (-share.nbytes, share.name)))

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": ANATOMY.artifact,
            "version": ANATOMY.version,
            "total_bytes": self.total_bytes,
            "tensor_bytes": self.tensor_bytes,
            "overhead_bytes": self.overhead_bytes,
            **dataclasses.asdict(self),
        }


def checked_name(raw: bytes, where: str) -> str:
    """A tensor name that is safe to print anywhere.

    Raises:
        ModelFileError: not UTF-8, or with control characters, which no writer makes and terminals obey.
    """
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{where} is damaged: a name is not UTF-8 ({error})") from error
    if not name.isprintable():
        raise ModelFileError(f"{where} has the tensor name {name!r}, with characters that cannot be printed")
    return name


def fact(value: object) -> str:
    """Metadata as one short printable line."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= _LONGEST_FACT else text[: _LONGEST_FACT - 1] + "…"
