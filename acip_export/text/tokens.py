"""Text to tokens and back, one token after the other, with nothing but ``tokenizers``: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError
from acip_export.io.atomic import read_json_object


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the special tokens that ``tokenizer_config.json`` names, by the names that chat templates use."""
    file = directory / "tokenizer_config.json"
    options = read_json_object(file, CheckpointError) if file.is_file() else {}
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = options.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[name] = token
    return found


class TextTokens:
    """The tokenizer of a directory.

    Attributes:
        special: tokens by the names that chat templates use. ends: the end-of-text token.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        file = directory / "tokenizer.json"
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception as reason:  # it raises plain Exceptions
            raise CheckpointError(f"{file} is missing or damaged: {reason}") from reason
        if getattr(self._tokenizer.model, "dropout", None) is not None:  # of training: pieces are drawn
            self._tokenizer.model.dropout = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special = special_tokens(directory)
        end = self._tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.ends: frozenset[int] = frozenset(() if end is None else (end,))

    def encode(self, text: str, begin: bool) -> list[int]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begin).ids
        # An end-of-text token, where the tokenizer puts one after every text, is not to be continued.
        return ids[:-1] if begin and ids and ids[-1] in self.ends else ids

    def stream(self) -> Callable[[int], str]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, token) or ""
