"""Text for calibration and evaluation: read, tokenized, packed, counted and hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acip_export.errors import DataError, InputError, UnsupportedError
from acip_export.model.chat_template import ChatTemplate, find_chat_template
from acip_export.model.checkpoint import Checkpoint
from acip_export.text.documents import Document, read_documents
from acip_export.text.pieces import pieces

if TYPE_CHECKING:
    import torch

# Far more than any ranking uses; keeps a data set of terabytes from being read to its end.
MOST_TOKENS = 2**24
_LEAST_WORDS = 3


@dataclass(frozen=True)
class PackedText:
    """Token windows of equal length.

    Attributes:
        windows: (n, context) int64.
        source: path as given. sha256: of the raw text. documents: that were read.
        tokens: in all windows together, padding not counted.
        padding: the token that fills up the end of shorter texts; ``None``: the windows are full.
    """

    windows: torch.Tensor
    source: str
    sha256: str
    documents: int = 1
    padding: int | None = None

    @property
    def tokens(self) -> int:
        return self.windows.numel() if self.padding is None else int((self.windows != self.padding).sum())


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
        source, field: see :func:`acip_export.text.documents.read_documents`.
        most_tokens: documents after these are not read, and a long one is not tokenized to its end.

    Raises:
        DataError: also when the text gives fewer than ``least_windows`` windows, or when the tokenizer is missing or
            of another model.
        UnsupportedError: chats for a model without a chat template.
    """
    import torch

    tokenizer = load_tokenizer(model)
    between = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else _ids(tokenizer, "\n")
    digest, texts_of = hashlib.sha256(), _Texts(model, tokenizer)
    ids: list[int] = []
    documents = 0
    for document in read_documents(source, field):
        text = texts_of.of(document)
        if not text.strip():
            continue
        if documents:
            digest.update(b"\0")
            ids += between
        digest.update(text.encode())
        for piece in pieces(tokenizer, text):
            ids += _ids(tokenizer, piece)
            if len(ids) >= most_tokens:
                break
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
    _check_vocabulary(model, max(ids))
    windows = torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)
    return PackedText(windows, str(source), digest.hexdigest(), documents)


def pad_texts(
    model: Path,
    source: str | Path,
    max_length: int,
    least: int = 1,
    field: str | None = None,
    most_tokens: int = MOST_TOKENS,
) -> PackedText:
    """For encoders: every line that differs from those before it is one text, with the tokenizer's special tokens.

    Blanks are collapsed; lines of less than ``_LEAST_WORDS`` words are left out. Texts longer than ``max_length``
    tokens are cut, shorter ones padded to the longest. Arguments as :func:`pack_text`; the order stays.

    Raises:
        DataError: also when there are fewer than ``least`` texts, or the tokenizer cannot pad.
    """
    import torch

    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer of {model} has no padding token; texts of different lengths need one")
    digest, texts_of = hashlib.sha256(), _Texts(model, tokenizer)
    texts: dict[str, list[int]] = {}
    documents = tokens = 0
    for document in read_documents(source, field):
        documents += 1
        lines = dict.fromkeys(" ".join(line.split()) for line in texts_of.of(document).splitlines())
        new = [line for line in lines if line.count(" ") + 1 >= _LEAST_WORDS and line not in texts]
        if not new:
            continue
        ids: list[list[int]] = tokenizer(new, truncation=True, max_length=max_length)["input_ids"]
        texts.update(zip(new, ids, strict=True))
        digest.update("\n".join(new).encode())
        tokens += sum(map(len, ids))
        if tokens >= most_tokens:
            break
    if len(texts) < least:
        raise DataError(
            f"{source} has {len(texts)} different lines of at least {_LEAST_WORDS} words, at least {least} are needed; "
            "an encoder is ranked on one text a line"
        )
    _check_vocabulary(model, max(max(ids) for ids in texts.values()))
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in texts.values()]
    windows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return PackedText(windows, str(source), digest.hexdigest(), documents, tokenizer.pad_token_id)


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


def _check_vocabulary(model: Path, largest: int) -> None:
    vocabulary = Checkpoint.open(model).shape.vocabulary
    if largest >= vocabulary:
        raise DataError(
            f"{model}: its tokenizer gives token {largest}, but the model has only {vocabulary} embeddings; "
            "put the tokenizer that belongs to the model beside it"
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class _Texts:
    """The texts of documents; chats go through the model's template."""

    def __init__(self, model: Path, tokenizer: Any) -> None:
        template = find_chat_template(model)
        tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._chats = None if template is None else ChatTemplate(template, tokens)

    def of(self, document: Document) -> str:
        if isinstance(document.content, str):
            return document.content
        if self._chats is None:
            raise UnsupportedError(
                f"{document.origin} is a chat, but the model's tokenizer has no chat template; "
                "choose a field that holds text with  --field"
            )
        try:
            return self._chats.render(document.content, answer=False)
        except InputError as error:
            raise DataError(f"{document.origin}: {error}") from error
