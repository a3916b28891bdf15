"""A GGUF file held open through llama.cpp's C interface: what sessions of language models and of encoders share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from ctypes import c_int32
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from acip_export.errors import VerificationError
from converters.gguf.arrange import model_file
from converters.gguf.runtimes import c_api as llama_capi

_BUFFER_LINE = re.compile(r"(\S+) +(model|LoRA|KV|compute|output) buffer size *= *([\d.]+) MiB")


@dataclass(frozen=True)
class BufferSizes:
    """What llama.cpp says it allocated, in bytes; it logs hundredths of a MiB.

    Attributes:
        model: weights, mapped or copied, repacked copies included. adapter: LoRA weights.
        kv_cache, compute, output: as llama.cpp names them.
    """

    model: int
    adapter: int
    kv_cache: int
    compute: int
    output: int

    @classmethod
    def parse(cls, log: Iterable[str]) -> BufferSizes:
        """Sum of the sizes in llama.cpp's log lines, by purpose.

        Compute and output buffers are replaced when they grow, the others are added to.
        """
        sizes: dict[tuple[str, str], float] = {}
        for match in filter(None, map(_BUFFER_LINE.search, log)):
            backend, purpose = match[1], match[2]
            before = 0.0 if purpose in ("compute", "output") else sizes.get((backend, purpose), 0.0)
            sizes[backend, purpose] = before + float(match[3])
        totals = {
            purpose: round(2**20 * sum(size for (_, found), size in sizes.items() if found == purpose))
            for purpose in ("model", "LoRA", "KV", "compute", "output")
        }
        return cls(*totals.values())


class NativeModel(ABC):
    """Model, context and batch. A subclass says what its context is like, in :meth:`_configure` and :meth:`_prepare`.

    Args:
        api, name: as :func:`converters.gguf.runtimes.c_api.find` gives them. batch_size: tokens of the largest batch.

    Attributes:
        name: runtime and way of access. buffers: what llama.cpp logged while opening.

    Raises:
        VerificationError: llama.cpp refuses the export; the message quotes its log.
    """

    _special_tokens_around: ClassVar[bool]

    def __init__(self, api: Any, name: str, export: Path, batch_size: int) -> None:
        self._api, self.name = api, name
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        with llama_capi.LOG.listen(api) as log:
            try:
                self._open(export, batch_size)
            except VerificationError as error:
                self._close()
                tail = "\n".join(f"  {line}" for line in list(log)[-5:])
                raise VerificationError(f"{error}; llama.cpp says:\n{tail}") from None
        self.buffers = BufferSizes.parse(log)

    @abstractmethod
    def _configure(self, params: Any) -> None:
        """Set ``llama_context_params``."""

    @abstractmethod
    def _prepare(self, export: Path) -> None:
        """What the opened context needs before its first use."""

    def _open(self, export: Path, batch_size: int) -> None:
        api = self._api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # a repacked copy would double the memory of the weights
        file = model_file(export)
        self._model = api.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise VerificationError(f"{file} cannot be loaded")
        context = api.llama_context_default_params()
        self._configure(context)
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            raise VerificationError(f"{file}: no context of {context.n_ctx} tokens")
        self._vocab = api.llama_model_get_vocab(self._model)
        self._batch = api.llama_batch_init(batch_size, 0, 1)
        self._prepare(export)

    def _fill(self, tokens: list[int], start: int, every: bool) -> Any:
        """The batch with one sequence's ``tokens`` from position ``start``; outputs of ``every`` token, or the last."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        return batch

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own tokens of ``text``, special ones recognised; around a text they stand for encoders only."""
        data = text.encode("utf-8")
        buffer = (c_int32 * (len(data) + 8))()
        around = self._special_tokens_around
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), around, True)
        return list(buffer[:count])

    def _close(self) -> None:
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)  # frees its adapters too
        self._batch = self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
