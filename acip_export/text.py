"""Text for calibration and evaluation: read, tokenized, packed, counted and hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acip_export.checkpoint import Checkpoint
from acip_export.documents import Document, read_documents
from acip_export.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    import torch

# Far more than any ranking uses; keeps a data set of terabytes from being read to its end.
MOST_TOKENS = 2**24


@dataclass(frozen=True)
class PackedText:
    """Token windows of equal length.

    Attributes:
        windows: (n, context) int64.
        source: path as given. sha256: of the raw text. tokens: in all windows together. documents: that were read.
    """

    windows: torch.Tensor
    source: str
    sha256: str
    documents: int = 1

    @property
    def tokens(self) -> int:
        return self.windows.numel()


def pack_text(
    model: Path,
    source: str | Path,
    context: int,
    least_windows: int = 1,
    field: str | None = None,
    most_tokens: int = MOST_TOKENS,
) -> PackedText:
    """Tokenize with the model's own tokenizer and cut into windows of ``context`` tokens.

    Without special tokens, except that the end-of-text token (or a line break where there is none) stands between
    documents. Chats become text through the model's chat template.

    Args:
        source, field: see :func:`acip_export.documents.read_documents`.
        most_tokens: documents after these are not read.

    Raises:
        DataError: also when the text gives fewer than ``least_windows`` windows, or when the tokenizer is missing or
            of another model.
        UnsupportedError: chats for a model without a chat template.
    """
    import torch

    tokenizer = load_tokenizer(model)
    between = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else _ids(tokenizer, "\n")
    digest = hashlib.sha256()
    ids: list[int] = []
    documents = 0
    for document in read_documents(source, field):
        text = _text_of(document, tokenizer)
        if not text.strip():
            continue
        if documents:
            digest.update(b"\0")
            ids += between
        digest.update(text.encode())
        ids += _ids(tokenizer, text)
        documents += 1
        if len(ids) >= most_tokens:
            del ids[most_tokens:]
            break
    if not documents:
        raise DataError(f"{source} is empty")
    count = len(ids) // context
    if count < least_windows:
        raise DataError(
            f"{source} has {len(ids):,} tokens, at least {least_windows * context:,} are needed "
            f"({least_windows} windows of {context})"
        )
    vocabulary = Checkpoint.open(model).shape.vocabulary
    if max(ids) >= vocabulary:
        raise DataError(
            f"{model}: its tokenizer gives token {max(ids)}, but the model has only {vocabulary} embeddings; "
            "put the tokenizer that belongs to the model beside it"
        )
    windows = torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)
    return PackedText(windows, str(source), digest.hexdigest(), documents)


def load_tokenizer(model: Path) -> Any:
    """The tokenizer beside the model.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises plain Exception for damaged files
        raise DataError(
            f"{model} has no usable tokenizer: {error}\nPut the tokenizer files of the model beside its weights"
        ) from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _text_of(document: Document, tokenizer: Any) -> str:
    if isinstance(document.content, str):
        return document.content
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            f"{document.origin} is a chat, but the model's tokenizer has no chat template; "
            "choose a field that holds text with  --field"
        )
    try:
        text: str = tokenizer.apply_chat_template(list(document.content), tokenize=False)
    except Exception as error:  # templates raise whatever they like, jinja2's own errors included
        raise DataError(f"{document.origin}: the model's chat template refuses this chat: {error}") from error
    return text
