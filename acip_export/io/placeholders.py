"""What downloads leave in place of a file: Git LFS pointers, web pages, nothing at all."""

from __future__ import annotations

from pathlib import Path

from acip_export.errors import InputError
from acip_export.io.inputs import open_input

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_START = 256


def refuse_placeholder(file: Path, error: type[InputError]) -> None:
    """Look at the first bytes of ``file``.

    Raises:
        error: they are those of a pointer or a web page, there are none, or the file cannot be opened.
    """
    with open_input(file, error) as stream:
        start = stream.read(_START)
    again = "download it again, for example with  hf download OWNER/NAME"
    if file.suffix == ".acip":
        again = "make it again with  acip-export rank"
    if not start:
        raise error(f"{file} is empty; {again}")
    if start.startswith(_LFS_POINTER):
        raise error(f"{file} is a Git LFS pointer, not the file itself; run  git lfs pull")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        raise error(f"{file} is a web page, not the file itself; {again}")
