"""The settings that only GGUF exports know, as the command line and a plan's ``options`` have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from acip_export.errors import PlanFileError
from acip_export.formats.protocol import Option, TensorLimit
from acip_export.units import parse_bytes

SPLIT = "split_max_size"
# Of a part with one tensor: keys, provenance, the tensor's entry and padding. A test compares with the writer's.
PART_HEAD = 576


def _file(text: str) -> str:
    return str(Path(text).resolve())


def _bytes(text: str) -> str:
    return str(parse_bytes(text, "--split-max-size"))


OPTIONS = (
    Option("pre_tokenizer", "llama.cpp's name of it, where it is not recognised.", "NAME"),
    Option("base_gguf", "llama.cpp's own file, for architectures not known.", "FILE", _file),
    Option(
        "imatrix",
        "llama.cpp's importance matrix, to round with.\n\nIn place of the score file's moments.",
        "FILE",
        _file,
    ),
    Option(SPLIT, "A model in several files of at most this size (2GB).\n\nllama.cpp opens the first.", "SIZE", _bytes),
)


def split_max_size(options: Mapping[str, str]) -> int | None:
    """Return the bytes that a file of the model may have; ``None``: any number.

    Raises:
        PlanFileError: it is no number of bytes.
    """
    text = options.get(SPLIT)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise PlanFileError(f"the plan's split_max_size is {text!r}, expected a number of bytes; plan again")
    return int(text)


def tensor_limit(options: Mapping[str, str]) -> TensorLimit | None:
    """Return the largest tensor that fits a file of ``--split-max-size``: a tensor lies in one file."""
    largest = split_max_size(options)
    if largest is None:
        return None
    return TensorLimit(
        largest - PART_HEAD,
        "in this type it is larger than a file of --split-max-size",
        lambda name, least: (
            f"--split-max-size {largest}B is too small: {name} takes at least {least:,} bytes; "
            f"give at least  {least + PART_HEAD}B"
        ),
    )


def file_notes(files: Mapping[str, int], options: Mapping[str, str]) -> tuple[str, ...]:
    """Say which files do not keep to the size."""
    largest = split_max_size(options)
    return tuple(
        f"{name} has {size:,} bytes, more than --split-max-size: llama.cpp opens an adapter from one file only"
        for name, size in files.items()
        if largest is not None and size > largest
    )
