"""What downloads leave in place of a file: Git LFS pointers, web pages, nothing at all."""

from __future__ import annotations

from pathlib import Path

from acip_export.errors import InputError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_START = 256


def refuse_placeholder(file: Path, error: type[InputError]) -> None:
    """Look at the first bytes of ``file``, which exists.

    Raises:
        error: they are those of a pointer or a web page, or there are none, or the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(_START)
    except OSError as reason:
        raise error(f"{file} cannot be read: {reason}") from reason
    again = "download it again, for example with  hf download OWNER/NAME"
    if not start:
        raise error(f"{file} is empty; {again}")
    if start.startswith(_LFS_POINTER):
        raise error(f"{file} is a Git LFS pointer, not the file itself; run  git lfs pull")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        raise error(f"{file} is a web page, not the file itself; {again}")
