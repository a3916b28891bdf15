"""Count what a tokenizer's tables hold: what runtimes keep of them is predicted from that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class TokenizerSize:
    """Entries of ``tokenizer.json``; none where there is no such file."""

    tokens: int = 0
    merges: int = 0


def tokenizer_size(model: Path) -> TokenizerSize:
    """Count tokens and merges of a model directory's ``tokenizer.json``."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return TokenizerSize()
    status = file.stat()
    return _tokenizer_size_of(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _tokenizer_size_of(file: Path, modified: int, size: int) -> TokenizerSize:  # noqa: ARG001 - part of the key
    """Parse once: a real vocabulary takes half a second. A damaged file is the converter's to refuse; it has none."""
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        return TokenizerSize(len(model.get("vocab") or ()), len(model.get("merges") or ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return TokenizerSize()
