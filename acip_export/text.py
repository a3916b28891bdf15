"""Text for calibration and evaluation: read, tokenized, packed, counted and hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedText:
    """Token windows of equal length.

    Attributes:
        windows: (n, context) int64.
        source: path as given. sha256: of the raw text. tokens: in all windows together.
    """

    windows: torch.Tensor
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        return self.windows.numel()


def read_text(source: Path) -> str:
    """The text of a file, or of every ``*.txt`` below a directory in path order.

    Raises:
        DataError: missing, empty or not UTF-8.
    """
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source} holds no *.txt file")
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except FileNotFoundError:
        raise DataError(f"{source} does not exist; give a text file or a directory with  --data") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"{source} is empty")
    return text


def pack_text(model: Path, source: Path, context: int, least_windows: int = 1) -> PackedText:
    """Tokenize with the model's own tokenizer, without special tokens, and cut into windows of ``context`` tokens.

    Raises:
        DataError: also when the text gives fewer than ``least_windows`` windows.
    """
    import torch
    from transformers import AutoTokenizer

    text = read_text(source)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // context
    if count < least_windows:
        raise DataError(
            f"{source} has {len(ids):,} tokens, at least {least_windows * context:,} are needed "
            f"({least_windows} windows of {context})"
        )
    windows = torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)
    return PackedText(windows, str(source), hashlib.sha256(text.encode()).hexdigest())
