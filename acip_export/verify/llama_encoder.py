"""Encoders in llama.cpp: embeddings and class scores of whole texts, through the C interface."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from acip_export.errors import MissingExtraError, VerificationError
from acip_export.plans import Runtime
from acip_export.verify import llama_capi
from acip_export.verify.llama_cpp import BufferSizes
from converters.gguf.ggml import processors
from converters.gguf.layouts import MODEL_FILE

# enum llama_pooling_type: a score for every class instead of an embedding.
_RANK = 4


class LlamaEncoderSession:
    """An opened GGUF export of an encoder; an :class:`~acip_export.verify.encoders.EncoderSession`.

    Attributes:
        name: runtime and way of access. buffers: what llama.cpp logged while opening.

    Raises:
        MissingExtraError: no build of llama.cpp with C symbols is installed.
        VerificationError: llama.cpp refuses the export; the message quotes its log.
    """

    def __init__(self, export: Path, runtime: Runtime, threads: int | None = None) -> None:
        found = llama_capi.find()
        if found is None:
            raise MissingExtraError("xllamacpp", "gguf", "running a GGUF export of an encoder")
        self._api, self.name = found
        self._model: int | None = None
        self._context: int | None = None
        with llama_capi.LOG.listen(self._api) as log:
            try:
                self._open(export, runtime, threads or processors())
            except VerificationError as error:
                self._close()
                tail = "\n".join(f"  {line}" for line in list(log)[-5:])
                raise VerificationError(f"{error}; llama.cpp says:\n{tail}") from None
        self.buffers = BufferSizes.parse(log)
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self._batch: Any = self._api.llama_batch_init(runtime.prompt_batch, 0, 1)
        ranks = self._api.llama_pooling_type(self._context) == _RANK
        self._width: int = (self._api.llama_model_n_cls_out if ranks else self._api.llama_model_n_embd)(self._model)
        self._most_tokens = runtime.context

    def _open(self, export: Path, runtime: Runtime, threads: int) -> None:
        api = self._api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False
        self._model = api.llama_model_load_from_file(str(export / MODEL_FILE).encode(), params)
        if not self._model:
            raise VerificationError(f"{export / MODEL_FILE} cannot be loaded")
        context = api.llama_context_default_params()
        # An encoder reads a text in one piece: the batch has to hold it whole.
        context.n_ctx = context.n_batch = context.n_ubatch = runtime.prompt_batch
        context.n_threads = context.n_threads_batch = threads
        context.embeddings = True
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            raise VerificationError(f"{export / MODEL_FILE}: no context of {runtime.prompt_batch} tokens")

    def outputs(self, texts: Iterable[list[int]]) -> npt.NDArray[np.float32]:
        """One vector a text (special tokens included): the pooled embedding, or the logits of the classes."""
        return np.stack([self._encode(tokens) for tokens in texts])

    def _encode(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        if len(tokens) > self._most_tokens:
            raise VerificationError(f"{len(tokens)} tokens do not fit the export's texts of {self._most_tokens}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True
        status = self._api.llama_encode(self._context, batch)
        if status:
            raise VerificationError(f"llama.cpp cannot encode {len(tokens)} tokens (status {status})")
        found = np.ctypeslib.as_array(self._api.llama_get_embeddings_seq(self._context, 0), (self._width,))
        return found.astype(np.float32)  # a copy: the buffer is llama.cpp's

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own tokens of ``text``, special tokens around it."""
        from ctypes import c_int32

        data = text.encode("utf-8")
        buffer = (c_int32 * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), True, True)
        return list(buffer[:count])

    def _close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._model:
            self._api.llama_batch_free(self._batch)
        self._close()
