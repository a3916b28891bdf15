"""Conversations in llama.cpp: the session that verifies, which goes on from what it holds."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from ctypes import create_string_buffer
from pathlib import Path

from acip_export.artifacts.plan import Serving
from acip_export.errors import MissingExtraError
from acip_export.formats.session import Logits
from acip_export.machine import processors
from converters.gguf.arrange import model_file
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes.llama_cpp import BUILD_COMMAND, NativeSession, has_factor_pairs

_LONGEST_PIECE = 1024


class LlamaChatSession(NativeSession):
    """An opened GGUF export; a :class:`~acip_export.formats.session.ChatSession`.

    Raises:
        MissingExtraError: no package with llama.cpp's C interface, or none that runs the export's factor pairs.
        VerificationError: llama.cpp refuses the export; the message quotes its log.
    """

    def __init__(self, export: Path, serving: Serving, threads: int | None = None) -> None:
        extended = has_factor_pairs(model_file(export))
        found = llama_capi.find(extended)
        if found is None and extended:
            raise MissingExtraError("a llama.cpp with our extension", "gguf", "running factor pairs", BUILD_COMMAND)
        if found is None:
            raise MissingExtraError(
                "xllamacpp (with C symbols) or llama-cpp-python", "gguf", "talking to a GGUF export"
            )
        super().__init__(*found, export, serving, threads or processors(), flash_attention=True, every_logit=False)
        api, vocab = self._api, self._vocab
        self.ends = frozenset(token for token in range(self._vocabulary) if api.llama_vocab_is_eog(vocab, token))
        special = {"bos_token": api.llama_vocab_bos(vocab), "eos_token": api.llama_vocab_eos(vocab)}
        self.tokens = {
            name: api.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
            for name, token in special.items()
            if token >= 0
        }
        self._first = [special["bos_token"]] if api.llama_vocab_get_add_bos(vocab) else []
        self._position = -1  # one token was computed to make the buffers

    def encode(self, text: str, begin: bool) -> list[int]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        return (self._first if begin else []) + self.tokenize(text)

    def stream(self) -> Callable[[int], str]:
        """See :class:`acip_export.formats.session.ChatSession`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        buffer = create_string_buffer(_LONGEST_PIECE)

        def piece(token: int) -> str:
            length = self._api.llama_token_to_piece(self._vocab, token, buffer, _LONGEST_PIECE, 0, False)
            return decoder.decode(buffer.raw[: max(length, 0)])

        return piece

    def extend(self, tokens: Sequence[int]) -> Logits:
        """See :class:`acip_export.formats.session.ChatSession`."""
        for start in range(0, len(tokens), self._batch_size):
            chunk = list(tokens[start : start + self._batch_size])
            last = self._decode(chunk, self._position, every=False)
            self._position += len(chunk)
        row: Logits = last[0]
        return row

    def rewind(self, position: int) -> int:
        """See :class:`acip_export.formats.session.ChatSession`."""
        if position != self._position:
            memory = self._api.llama_get_memory(self._context)
            # Layers with a sliding window have lost what was before it.
            whole = self._api.llama_memory_seq_pos_min(memory, 0) == 0
            if not position or not whole or not self._api.llama_memory_seq_rm(memory, 0, position, -1):
                self._forget()
                position = 0
            self._position = position
        return position
