"""Count what a tokenizer's tables hold: what runtimes keep of them is predicted from that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec

from acip_export.errors import CheckpointError
from acip_export.io.inputs import read_json
from acip_export.io.stamps import Stamp, stamp_of


@dataclass(frozen=True)
class TokenizerSize:
    """Entries of ``tokenizer.json``; none where there is no such file."""

    tokens: int = 0
    merges: int = 0


class _Tables(msgspec.Struct, frozen=True):
    vocab: dict[str, msgspec.Raw] | list[msgspec.Raw] | None = None
    merges: list[msgspec.Raw] | None = None


class _Tokenizer(msgspec.Struct, frozen=True):
    """What is counted of ``tokenizer.json``."""

    model: _Tables


def tokenizer_size(model: Path) -> TokenizerSize:
    """Count tokens and merges of a model directory's ``tokenizer.json``."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return TokenizerSize()
    return _tokenizer_size_of(file, stamp_of(file))


@lru_cache(maxsize=8)
def _tokenizer_size_of(file: Path, stamp: Stamp | None) -> TokenizerSize:  # noqa: ARG001 - part of the key
    """Read once. A damaged file is the converter's to refuse; it has none."""
    try:
        model = read_json(file, _Tokenizer, CheckpointError).model
    except CheckpointError:
        return TokenizerSize()
    return TokenizerSize(len(model.vocab or ()), len(model.merges or ()))
