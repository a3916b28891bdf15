"""The options of llama.cpp's command lines, as the installed library has them."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterable
from pathlib import Path

import xllamacpp.xllamacpp


def unknown_options(words: Iterable[str]) -> list[str]:
    """Those of ``words`` that no option is called: its names stand in the library, each ended by a zero."""
    return [word for word in words if word.startswith("-") and not word[1:].isdigit() and not _is_known(word)]


@functools.cache
def _is_known(option: str) -> bool:
    with (
        Path(xllamacpp.xllamacpp.__file__).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        return library.find(b"\0" + option.encode() + b"\0") >= 0
