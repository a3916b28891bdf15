"""``--split-max-size``: the model in several files, as llama.cpp's gguf-split makes them.

Unlike gguf-split, which counts the tensors' data alone, a file is counted whole: none is larger than was asked for.
Tensors keep their order, every file takes as many as it holds, and the first may hold none beside the metadata. An
adapter is not split: llama.cpp opens one from a single file only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from acip_export.errors import UsageError
from acip_export.inspection.gguf_split import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, part_names
from acip_export.model.checkpoint import Checkpoint
from converters.gguf.arrange import Item
from converters.gguf.options import split_max_size
from converters.gguf.writer import (
    Metadata,
    TensorSpec,
    encode_info,
    encode_keys,
    file_bytes,
    int32,
    padded,
    uint16,
)

# What split.count, a 16-bit number, can say.
_MOST_PARTS = 2**16 - 1


@dataclass(frozen=True)
class Contents:
    """What is written into one file."""

    metadata: Metadata
    items: tuple[Item, ...]

    @property
    def specs(self) -> list[TensorSpec]:
        return [item.spec for item in self.items]

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        return file_bytes(self.metadata, self.specs)


def split(name: str, contents: Contents, checkpoint: Checkpoint) -> dict[str, Contents]:
    """``contents`` as the files that the user's ``--split-max-size`` makes of them; one, if it fits.

    Raises:
        UsageError: the metadata or a single tensor does not fit.
    """
    largest = split_max_size(checkpoint.options)
    if largest is None or contents.nbytes <= largest:
        return {name: contents}
    # Every file says what it belongs to (docs/format.md); all else is in the first, as gguf-split has it.
    own = {key: value for key, value in contents.metadata.items() if key.startswith("acip.")}
    total = len(contents.items)
    groups = _pack({**contents.metadata, **_keys(0, 0, total)}, {**own, **_keys(0, 0, total)}, contents.items, largest)
    if len(groups) > _MOST_PARTS:
        raise UsageError(f"--split-max-size {largest}B makes {len(groups)} files, GGUF numbers up to {_MOST_PARTS}")
    return {
        part: Contents({**(contents.metadata if number == 0 else own), **_keys(number, len(groups), total)}, group)
        for number, (part, group) in enumerate(zip(part_names(name, len(groups)), groups, strict=True))
    }


def _keys(number: int, count: int, tensors: int) -> Metadata:
    return {SPLIT_NUMBER: uint16(number), SPLIT_COUNT: uint16(count), SPLIT_TENSORS: int32(tensors)}


def _pack(first: Metadata, other: Metadata, items: Sequence[Item], largest: int) -> list[tuple[Item, ...]]:
    head, data = len(encode_keys(first, 0)), 0
    if padded(head) > largest:
        raise _too_small(largest, "metadata and tokenizer take", padded(head))
    groups: list[list[Item]] = [[]]
    for item in items:
        info, size = len(encode_info(item.spec, 0)), padded(item.spec.nbytes)
        if padded(head + info) + data + size > largest:
            groups.append([])
            head, data = len(encode_keys(other, 0)), 0
            if padded(head + info) + size > largest:
                what = f"a file with nothing but {item.spec.name} ({item.spec.type}) takes"
                raise _too_small(largest, what, padded(head + info) + size)
        groups[-1].append(item)
        head, data = head + info, data + size
    return [tuple(group) for group in groups]


def _too_small(largest: int, what: str, needed: int) -> UsageError:
    return UsageError(f"--split-max-size {largest}B is too small: {what} {needed:,} bytes; give at least  {needed}B")
