"""The settings that only GGUF exports know, as the command line and a plan's ``options`` have them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from acip_export.errors import PlanFileError, UsageError
from acip_export.formats.protocol import Option, TensorLimit
from acip_export.units import parse_bytes
from acip_export.weight_types import is_older, weight_type
from converters.gguf.types import GGML

RUNTIME_VERSION, SPLIT = "runtime_version", "split_max_size"
# Of a part with one tensor: keys, provenance, the tensor's entry and padding. A test compares with the writer's.
PART_HEAD = 576


def _file(text: str) -> str:
    return str(Path(text).resolve())


def _release(text: str) -> str:
    found = re.fullmatch(r"b?([0-9]{1,9})", text.strip().lower())
    if found is None:
        raise UsageError(f"--runtime-version {text!r} is no release of llama.cpp; they are called  b10015")
    return f"b{int(found[1])}"


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
    Option(
        RUNTIME_VERSION,
        "Oldest llama.cpp that is to read it (b9500).\n\nTypes that are newer stay out.",
        "RELEASE",
        _release,
    ),
    Option(SPLIT, "Several files of at most this size (2GB).\n\nllama.cpp opens the first.", "SIZE", _bytes),
)


def unknown_types(options: Mapping[str, str]) -> dict[str, str]:
    """Return the types that ``--runtime-version`` does not know, or no ggml here, and why they are refused.

    Raises:
        UsageError: it is no release.
    """
    asked = options.get(RUNTIME_VERSION)
    release = None if asked is None else _release(asked)
    found = {}
    for row in (row for row in GGML if row.since):
        if release is not None and is_older(release, row.since):
            found[row.name] = f"llama.cpp is known to read it from {row.since} on, and --runtime-version is {release}"
        elif not _is_here():
            found[row.name] = "no ggml that reads it is here; pip install 'acip-export[gguf]'"
    return found


def type_notes(types: Collection[str], options: Mapping[str, str]) -> tuple[str, ...]:
    """Say which types not every llama.cpp reads, or multiplies fast, unless the user has named a release."""
    if "q2_0" not in types or RUNTIME_VERSION in options:
        return ()
    since = weight_type("gguf", "q2_0").since
    return (
        f"q2_0 needs llama.cpp {since} or later (with CUDA some weeks more), and is slow on x86 processors, a seventh "
        "of q4_0's speed;  --runtime-version b9500  keeps it out",
    )


def _is_here() -> bool:
    from converters.gguf.ggml_library import load_library

    return load_library() is not None


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
