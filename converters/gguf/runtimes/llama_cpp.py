"""llama.cpp as a runtime: opens a GGUF export with the context, batch and cache types of its plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ctypes import c_float, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import InputError, MissingExtraError, VerificationError
from acip_export.formats.session import Logits, RuntimeSession, Windows
from acip_export.inspection.gguf_split import read_parts
from acip_export.machine import processors
from converters.gguf.arrange import ADAPTER_FILE, FACTOR_SUFFIXES, model_file
from converters.gguf.ggml_library import library_path
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes.llama_native import BufferSizes, NativeModel
from converters.gguf.types import TYPE_IDS

# Where our extension comes from, for who has the package only; in a checkout, make llama-cpp does the same.
BUILD_COMMAND = "python -m converters.gguf.llama_cpp.build"
# enum llama_flash_attn_type
_FLASH_OFF, _FLASH_ON = 0, 1


def has_factor_pairs(file: Path) -> bool:
    """Whether a GGUF model has tensors in factored form. A damaged one has not: llama.cpp will say what is wrong."""
    try:
        parts = read_parts(file)
    except InputError:
        return False
    return any(tensor.name.endswith(FACTOR_SUFFIXES) for part in parts for tensor in part.head.tensors)


class LlamaCppSession:
    """An opened GGUF export; a :class:`~acip_export.formats.session.RuntimeSession`.

    Through llama-cpp-python if installed, else xllamacpp's C symbols, else (where a build hides them, as on Windows)
    xllamacpp's server, which is slow and gives log-probabilities instead of logits.

    Args:
        extended: open it with a llama.cpp that runs factor pairs; ``None``: if the export has some.
        flash_attention: as served. Off, together with a float32 cache, llama.cpp calculates attention in float32
            (flash attention rounds keys and values to float16 whatever the cache), and agrees with PyTorch to 1e-4.

        every_logit: reserve room for the logits of a whole prompt batch. Without it :meth:`logits` must not be called.

    Attributes:
        name: runtime and way of access. buffers: what llama.cpp logged while opening; ``None`` from the server.

    Raises:
        MissingExtraError: neither package is installed, or none that runs the export's factor pairs.
        VerificationError: llama.cpp refuses the export; the message quotes its log.
    """

    def __init__(
        self,
        export: Path,
        serving: Serving,
        threads: int | None = None,
        flash_attention: bool = True,
        extended: bool | None = None,
        every_logit: bool = True,
    ) -> None:
        threads = threads or processors()
        self._session: RuntimeSession
        self.buffers: BufferSizes | None = None
        extended = has_factor_pairs(model_file(export)) if extended is None else extended
        found = llama_capi.find(extended)
        if found is not None:
            native = NativeSession(*found, export, serving, threads, flash_attention, every_logit)
            self._session, self.buffers = native, native.buffers
        elif extended:
            raise MissingExtraError("a llama.cpp with our extension", "gguf", "running factor pairs", BUILD_COMMAND)
        elif library_path() is not None:
            from converters.gguf.runtimes.llama_server import ServerSession

            self._session = ServerSession(export, serving, threads, flash_attention)
        else:
            raise MissingExtraError("xllamacpp", "gguf", "running a GGUF export")
        self.name = self._session.name

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """For each window of ``windows`` (n, tokens): float32 (tokens, vocabulary)."""
        return self._session.logits(windows)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``prompt``; end-of-text does not stop it."""
        return self._session.greedy(prompt, count)

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        return self._session.speed(prompt, new_tokens)

    def tokenize(self, text: str) -> list[int] | None:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        return self._session.tokenize(text)

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, value, traceback)


class NativeSession(NativeModel):
    """A language model."""

    _special_tokens_around: ClassVar = False

    def __init__(
        self,
        api: Any,
        name: str,
        export: Path,
        serving: Serving,
        threads: int,
        flash_attention: bool,
        every_logit: bool,
    ) -> None:
        self._batch_size = min(serving.prompt_batch, serving.context)
        self._runtime, self._threads = serving, threads
        self._flash_attention, self._every_logit = flash_attention, every_logit
        super().__init__(api, name, export, self._batch_size)

    def _configure(self, params: Any) -> None:
        params.n_outputs_max = 0 if self._every_logit else 1
        params.n_ctx, params.n_batch, params.n_ubatch = self._runtime.context, self._batch_size, self._batch_size
        params.swa_full = False  # as llama-server does: layers with a sliding window keep no more than it
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k, params.type_v = TYPE_IDS[self._runtime.cache_type_k], TYPE_IDS[self._runtime.cache_type_v]
        # A quantized cache of values needs it, and the plan's memory formulas assume it.
        params.flash_attn_type = _FLASH_ON if self._flash_attention else _FLASH_OFF

    def _prepare(self, export: Path) -> None:
        api = self._api
        self._vocabulary: int = api.llama_vocab_n_tokens(self._vocab)
        adapter = export / ADAPTER_FILE
        if adapter.is_file():
            handle = api.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not handle:
                raise VerificationError(f"{adapter} cannot be loaded")
            # Numbers from one binding, pointers of its own type from the other.
            kind: Any = c_void_p if isinstance(handle, int) else type(handle)
            if api.llama_set_adapters_lora(self._context, (kind * 1)(handle), 1, (c_float * 1)(1.0)):
                raise VerificationError(f"{adapter} does not fit {model_file(export).name}")
        self._decode([0], 0, every=False)  # with adapters, buffers grow at the first token

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], start: int, every: bool) -> Logits:
        """Logits (n, vocabulary) of every token, or (1, vocabulary) of the last; appends to the cache at ``start``."""
        status = self._api.llama_decode(self._context, self._fill(tokens, start, every))
        if status:
            raise VerificationError(
                f"llama.cpp cannot decode tokens {start} to {start + len(tokens)} (status {status})"
            )
        rows = len(tokens) if every else 1
        found = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (rows, self._vocabulary))
        return found.astype(np.float32)  # a copy: the buffer is llama.cpp's

    def _feed(self, tokens: list[int], every: bool) -> Iterator[Logits]:
        if len(tokens) > self._runtime.context:
            raise VerificationError(f"{len(tokens)} tokens do not fit the export's context of {self._runtime.context}")
        self._forget()
        for start in range(0, len(tokens), self._batch_size):
            yield self._decode(tokens[start : start + self._batch_size], start, every)

    def logits(self, windows: Windows) -> Iterator[Logits]:
        for window in windows:
            yield np.concatenate(list(self._feed([int(token) for token in window], every=True)))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        *_, last = self._feed(prompt, every=False)
        tokens: list[int] = []
        while len(tokens) < count:
            if tokens:
                last = self._decode(tokens[-1:], len(prompt) + len(tokens) - 1, every=False)
            tokens.append(int(last[0].argmax()))
        return tokens

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        begin = time.perf_counter()
        for _chunk in self._feed(prompt, every=False):
            pass
        middle = time.perf_counter()
        for index in range(new_tokens):
            self._decode([index % self._vocabulary], len(prompt) + index, every=False)
        end = time.perf_counter()
        return Speed(len(prompt) / (middle - begin), new_tokens / (end - middle), len(prompt), new_tokens)
