"""Conversations with ONNX exports, in onnxruntime-genai and in plain onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.errors import VerificationError
from acip_export.formats.session import Logits
from acip_export.io.inputs import read_json
from acip_export.text.tokens import TextTokens, special_tokens
from converters.onnx.companion_files import GENAI_CONFIG
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession


class GenaiChatSession(GenaiSession):
    """In onnxruntime-genai; a :class:`~acip_export.formats.session.ChatSession`.

    One generator for the whole conversation: a second one would find a heap with holes, and hold a second cache.
    """

    def __init__(self, export: Path, serving: Serving, threads: int | None = None) -> None:
        super().__init__(export, serving, threads)
        self.ends = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        self.tokens = special_tokens(export)
        self._conversation: Any = self._generator()

    def encode(self, text: str, begin: bool) -> list[int]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        self._tokenizer.update_options(add_special_tokens=str(begin).lower())
        ids = [int(token) for token in self._tokenizer.encode(text)]
        # An end-of-text token, where the tokenizer puts one after every text, is not to be continued.
        return ids[:-1] if begin and ids and ids[-1] in self.ends else ids

    def stream(self) -> Callable[[int], str]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        decode: Callable[[int], str] = self._tokenizer.create_stream().decode
        return decode

    def extend(self, tokens: Sequence[int]) -> Logits:
        """See :class:`acip_export.formats.session.ChatSession`.

        In batches: genai makes them of the first prompt alone, and computes what follows it in one piece.
        """
        for start in range(0, len(tokens), self._batch):
            self._conversation.append_tokens(np.array(tokens[start : start + self._batch], np.int32))
        return np.array(self._conversation.get_logits(), np.float32).reshape(-1)

    def rewind(self, position: int) -> int:
        """See :class:`acip_export.formats.session.ChatSession`."""
        if position != self._conversation.token_count():
            self._conversation.rewind_to(position)
        return position


class _Ends(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int]


class _GenaiConfig(msgspec.Struct, frozen=True):
    """What ends an answer, of ``genai_config.json``."""

    model: _Ends


class OnnxRuntimeChatSession(OnnxRuntimeSession):
    """In plain onnxruntime; a :class:`~acip_export.formats.session.ChatSession`."""

    def __init__(self, export: Path, serving: Serving, threads: int | None = None) -> None:
        super().__init__(export, serving, threads or 0)
        texts = TextTokens(export)
        found = read_json(export / GENAI_CONFIG, _GenaiConfig, VerificationError).model.eos_token_id
        self.ends = texts.ends | frozenset(found if isinstance(found, list) else [found])
        self.tokens, self.encode, self.stream = texts.special, texts.encode, texts.stream
        self._position = 0

    def extend(self, tokens: Sequence[int]) -> Logits:
        """See :class:`acip_export.formats.session.ChatSession`."""
        for start in range(0, len(tokens), self._batch):
            chunk = list(tokens[start : start + self._batch])
            self._step(chunk, self._position)
            self._position += len(chunk)
        last: Logits = self._scores()[-1]
        return last

    def rewind(self, position: int) -> int:
        """See :class:`acip_export.formats.session.ChatSession`."""
        if position != self._position and not self._in_place:
            self._cut(position)
        self._position = position
        return position
