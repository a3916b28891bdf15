"""A GGUF model in several files, as llama.cpp's gguf-split names and numbers them. llama.cpp is told the first one.

Every part is a GGUF file of its own, with ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of all
parts together); all other keys are in the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from acip_export.errors import ModelFileError
from acip_export.inspection.anatomy import TensorPart
from acip_export.inspection.gguf import GgufHead, facts_of, read_head

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# What all parts of one of our exports have in common. gguf-split's parts do not say what they belong to, and have it in
# the first only when it has split an export.
_IDENTITY = "acip.plan_sha256"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class PartName:
    """``STEM-00002-of-00003.gguf``; ``number`` counts from 1."""

    stem: str
    number: int
    count: int

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = _NAME.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{self.stem}-{self.number:05d}-of-{self.count:05d}.gguf"


@dataclass(frozen=True)
class Part:
    """One file of a model, opened; holds no numbers."""

    file: Path
    head: GgufHead


def part_names(name: str, count: int) -> tuple[str, ...]:
    """The files of ``name``, in their order: itself, if there is only one."""
    if count == 1:
        return (name,)
    return tuple(str(PartName(name.removesuffix(".gguf"), number, count)) for number in range(1, count + 1))


def files_of(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that are ``name`` or its parts, in their order; the first one is what llama.cpp is told."""
    stem = name.removesuffix(".gguf")
    found = []
    for each in names:
        part = PartName.parse(each)
        if each == name or (part is not None and part.stem == stem):
            found.append(each)
    return tuple(sorted(found))


def read_parts(file: Path) -> tuple[Part, ...]:
    """The model that ``file`` is, or is the first part of.

    Raises:
        ModelFileError: a part is missing, damaged, of another model, in another place than its own, or not the first.
    """
    first = Part(file, read_head(file))
    count = _number(first, SPLIT_COUNT) if SPLIT_COUNT in first.head.values else 1
    if count <= 1:
        return (first,)
    name = PartName.parse(file.name)
    number = _number(first, SPLIT_NUMBER) + 1
    if name is None or (name.number, name.count) != (number, count):
        raise ModelFileError(
            f"{file} is part {number} of {count} by its metadata, and its name does not say so; call it "
            f"NAME{PartName('', number, count)}, and the other parts alike"
        )
    if number != 1:
        raise ModelFileError(f"{file} is part {number} of {count}; name the first: {PartName(name.stem, 1, count)}")
    parts = [first]
    for each in part_names(f"{name.stem}.gguf", count)[1:]:
        parts.append(_next_part(parts, file.with_name(each), count))
    _check_tensors(parts)
    return tuple(parts)


def read_gguf(file: Path, name: str) -> tuple[tuple[TensorPart, ...], dict[str, str], dict[str, int]]:
    """Tensors and facts of a model, and the bytes of its parts after the first.

    Args:
        name: what stands for ``file`` as the place of its tensors; other parts lie beside it.

    Raises:
        ModelFileError: see :func:`read_parts`.
    """
    parts = read_parts(file)
    names = [PurePosixPath(name).with_name(part.file.name).as_posix() for part in parts]
    tensors = tuple(
        TensorPart(tensor.name, tensor.shape, tensor.type_name, tensor.nbytes, place)
        for place, part in zip(names, parts, strict=True)
        for tensor in part.head.tensors
    )
    others = {place: part.file.stat().st_size for place, part in zip(names[1:], parts[1:], strict=True)}
    return tensors, facts_of(parts[0].head), others


def _next_part(parts: list[Part], file: Path, count: int) -> Part:
    if not file.is_file():
        raise ModelFileError(f"{file} is missing: {parts[0].file} is the first of {count} parts, all in one directory")
    part = Part(file, read_head(file))
    found = _number(part, SPLIT_NUMBER) + 1, _number(part, SPLIT_COUNT)
    if found != (len(parts) + 1, count):
        raise ModelFileError(
            f"{file} is part {found[0]} of {found[1]} by its metadata, and part {len(parts) + 1} of {count} by its "
            "name; give every part its own name back"
        )
    first = parts[0]
    for key in (SPLIT_TENSORS, _IDENTITY):
        if key in part.head.values and part.head.values[key] != first.head.values.get(key):
            raise ModelFileError(f"{file} is a part of another model than {first.file}: they differ in {key}")
    return part


def _check_tensors(parts: list[Part]) -> None:
    first, seen = parts[0].file, dict[str, Path]()
    for part in parts:
        for tensor in part.head.tensors:
            if tensor.name in seen:
                raise ModelFileError(f"{first} is damaged: {tensor.name!r} is in {seen[tensor.name]} and {part.file}")
            seen[tensor.name] = part.file
    expected = _number(parts[0], SPLIT_TENSORS)
    if len(seen) != expected:
        raise ModelFileError(f"{first} is damaged: its parts have {len(seen)} tensors, {expected} are declared")


def _number(part: Part, key: str) -> int:
    found = part.head.values.get(key)
    if type(found) is not int or found < 0:
        raise ModelFileError(f"{part.file} is damaged: {key} is {found!r}, expected a number")
    return found
