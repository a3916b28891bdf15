"""Encoders in llama.cpp: embeddings and class scores of whole texts, through the C interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import MissingExtraError, VerificationError
from acip_export.formats.session import Vectors, encoding_speed
from acip_export.machine import processors
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes.llama_native import NativeModel

# enum llama_pooling_type: a score for every class instead of an embedding.
_RANK = 4


class LlamaEncoderSession(NativeModel):
    """An opened GGUF export of an encoder; an :class:`~acip_export.formats.session.EncoderSession`.

    Raises:
        MissingExtraError: no build of llama.cpp with C symbols is installed. Others as :class:`NativeModel`.
    """

    _special_tokens_around: ClassVar = True

    def __init__(self, export: Path, serving: Serving, threads: int | None = None) -> None:
        found = llama_capi.find()
        if found is None:
            raise MissingExtraError("xllamacpp", "gguf", "running a GGUF export of an encoder")
        self._runtime, self._threads = serving, threads or processors()
        super().__init__(*found, export, serving.prompt_batch)

    def _configure(self, params: Any) -> None:
        # An encoder reads a text in one piece: the batch has to hold it whole.
        params.n_ctx = params.n_batch = params.n_ubatch = self._runtime.prompt_batch
        params.n_threads = params.n_threads_batch = self._threads
        params.embeddings = True

    def _prepare(self, export: Path) -> None:  # noqa: ARG002
        api = self._api
        ranks = api.llama_pooling_type(self._context) == _RANK
        self._width: int = (api.llama_model_n_cls_out if ranks else api.llama_model_n_embd)(self._model)

    def outputs(self, texts: Sequence[list[int]]) -> Vectors:
        """One vector a text (special tokens included): the pooled embedding, or the logits of the classes."""
        return np.stack([self._encode(tokens) for tokens in texts])

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:  # noqa: ARG002 - nothing is generated
        """See :class:`acip_export.formats.session.ProbedSession`."""
        return encoding_speed(self, prompt, self._runtime.context)

    def _encode(self, tokens: list[int]) -> Vectors:
        longest = self._runtime.context
        if len(tokens) > longest:
            raise VerificationError(f"{len(tokens)} tokens do not fit the export's texts of {longest}")
        status = self._api.llama_encode(self._context, self._fill(tokens, 0, every=True))
        if status:
            raise VerificationError(f"llama.cpp cannot encode {len(tokens)} tokens (status {status})")
        found = np.ctypeslib.as_array(self._api.llama_get_embeddings_seq(self._context, 0), (self._width,))
        return found.astype(np.float32)  # a copy: the buffer is llama.cpp's
