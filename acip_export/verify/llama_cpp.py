"""llama.cpp as a runtime: opens a GGUF export with the context, batch and cache types of its plan."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from acip_export.anatomy.gguf import read_gguf
from acip_export.errors import InputError, MissingExtraError, VerificationError
from acip_export.plans import Runtime
from acip_export.verify import llama_capi
from acip_export.verify.runtime import Logits, RuntimeSession, Speed, Windows
from converters.gguf.ggml import TYPE_IDS, library_path, processors
from converters.gguf.layouts import ADAPTER_FILE, FACTOR_SUFFIXES, MODEL_FILE

# Where our extension comes from, for who has the package only; in a checkout, make llama-cpp does the same.
BUILD_COMMAND = "python -m converters.gguf.build_llama_cpp"
_BUFFER_LINE = re.compile(r"(\S+) +(model|LoRA|KV|compute|output) buffer size *= *([\d.]+) MiB")
# enum llama_flash_attn_type
_FLASH_OFF, _FLASH_ON = 0, 1


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


def has_factor_pairs(file: Path) -> bool:
    """Whether a GGUF file has tensors in factored form. A damaged one has not: llama.cpp will say what is wrong."""
    try:
        tensors, _ = read_gguf(file, file.name)
    except InputError:
        return False
    return any(tensor.name.endswith(FACTOR_SUFFIXES) for tensor in tensors)


class LlamaCppSession:
    """An opened GGUF export; a :class:`~acip_export.verify.runtime.RuntimeSession`.

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
        runtime: Runtime,
        threads: int | None = None,
        flash_attention: bool = True,
        extended: bool | None = None,
        every_logit: bool = True,
    ) -> None:
        threads = threads or processors()
        self._session: RuntimeSession
        self.buffers: BufferSizes | None = None
        extended = has_factor_pairs(export / MODEL_FILE) if extended is None else extended
        found = llama_capi.find(extended)
        if found is not None:
            native = _NativeSession(*found, export, runtime, threads, flash_attention, every_logit)
            self._session, self.buffers = native, native.buffers
        elif extended:
            raise MissingExtraError("a llama.cpp with our extension", "gguf", "running factor pairs", BUILD_COMMAND)
        elif library_path() is not None:
            from acip_export.verify.llama_server import ServerSession

            self._session = ServerSession(export, runtime, threads, flash_attention)
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
        """See :class:`acip_export.verify.runtime.RuntimeSession`."""
        return self._session.speed(prompt, new_tokens)

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own tokens of ``text``: special tokens recognised, none added."""
        tokens: list[int] = self._session.tokenize(text)  # type: ignore[attr-defined]
        return tokens

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, value, traceback)


class _NativeSession:
    """Model and context held through the C interface."""

    def __init__(
        self,
        api: Any,
        name: str,
        export: Path,
        runtime: Runtime,
        threads: int,
        flash_attention: bool,
        every_logit: bool,
    ) -> None:
        self._api, self.name = api, name
        self._batch_size = min(runtime.prompt_batch, runtime.context)
        self._context_size = runtime.context
        self._model: int | None = None
        self._context: int | None = None
        with llama_capi.LOG.listen(self._api) as log:
            try:
                self._open(export, runtime, threads, flash_attention, every_logit)
                self._vocab = self._api.llama_model_get_vocab(self._model)
                self._vocabulary: int = self._api.llama_vocab_n_tokens(self._vocab)
                self._batch: Any = self._api.llama_batch_init(self._batch_size, 0, 1)
                self._decode([0], 0, every=False)  # with adapters, buffers grow at the first token
            except VerificationError as error:
                self._close()
                tail = "\n".join(f"  {line}" for line in list(log)[-5:])
                raise VerificationError(f"{error}; llama.cpp says:\n{tail}") from None
        self.buffers = BufferSizes.parse(log)

    def _open(self, export: Path, runtime: Runtime, threads: int, flash_attention: bool, every_logit: bool) -> None:
        api = self._api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # a repacked copy would double the memory of the weights
        self._model = api.llama_model_load_from_file(str(export / MODEL_FILE).encode(), params)
        if not self._model:
            raise VerificationError(f"{export / MODEL_FILE} cannot be loaded")
        adapters = [export / ADAPTER_FILE] if (export / ADAPTER_FILE).is_file() else []
        handles = [api.llama_adapter_lora_init(self._model, str(file).encode()) for file in adapters]
        if not all(handles):
            raise VerificationError(f"{export / ADAPTER_FILE} cannot be loaded")
        context = api.llama_context_default_params()
        context.n_outputs_max = 0 if every_logit else 1
        context.n_ctx, context.n_batch, context.n_ubatch = runtime.context, self._batch_size, self._batch_size
        context.swa_full = False  # as llama-server does: layers with a sliding window keep no more than it
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = TYPE_IDS[runtime.cache_type]
        # A quantized cache of values needs it, and the plan's memory formulas assume it.
        context.flash_attn_type = _FLASH_ON if flash_attention else _FLASH_OFF
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            raise VerificationError(f"{export / MODEL_FILE}: no context of {runtime.context} tokens")
        if handles:
            # Numbers from one binding, pointers of its own type from the other.
            kind: Any = c_void_p if isinstance(handles[0], int) else type(handles[0])
            pointers = (kind * len(handles))(*handles)
            scales = (c_float * len(handles))(*[1.0] * len(handles))
            if api.llama_set_adapters_lora(self._context, pointers, len(handles), scales):
                raise VerificationError(f"{export / ADAPTER_FILE} does not fit {MODEL_FILE}")

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], start: int, every: bool) -> Logits:
        """Logits (n, vocabulary) of every token, or (1, vocabulary) of the last; appends to the cache at ``start``."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise VerificationError(
                f"llama.cpp cannot decode tokens {start} to {start + len(tokens)} (status {status})"
            )
        rows = len(tokens) if every else 1
        found = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (rows, self._vocabulary))
        return found.astype(np.float32)  # a copy: the buffer is llama.cpp's

    def _feed(self, tokens: list[int], every: bool) -> Iterator[Logits]:
        if len(tokens) > self._context_size:
            raise VerificationError(f"{len(tokens)} tokens do not fit the export's context of {self._context_size}")
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

    def tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8")
        buffer = (c_int32 * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def _close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)  # frees its adapters too
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._model:
            self._api.llama_batch_free(self._batch)
        self._close()
