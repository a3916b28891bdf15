"""llama.cpp through xllamacpp's embedded server: for builds that hide the C symbols. Slow: one request a position.

The server reports log-probabilities of the next token only, and none where that token is no whole character or ends
the text; so each request is biased towards a plain letter, which the reported (unbiased) log-probabilities don't show.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import VerificationError
from acip_export.formats.session import Logits, Windows
from converters.gguf.arrange import ADAPTER_FILE, model_file

_PLAIN_LETTER, _BIAS = "a", 1e4
_TIMEOUT_SECONDS = 60
_SILENT = -1


def server_parameters(export: Path, serving: Serving, threads: int, flash_attention: bool = True) -> Any:
    """Return ``xllamacpp.CommonParams`` with the plan's settings: what the printed llama-server is told."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_file(export))
    if (export / ADAPTER_FILE).is_file():
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(export / ADAPTER_FILE), 1.0)]
    batch = min(serving.prompt_batch, serving.context)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = serving.context, batch, batch, 1
    params.cache_type_k, params.cache_type_v = (
        getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")
        for name in (serving.cache_type_k, serving.cache_type_v)
    )
    flash = "ENABLED" if flash_attention else "DISABLED"
    params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    params.no_extra_bufts, params.warmup, params.n_gpu_layers = True, False, 0
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return params


class ServerSession:
    """An opened export; a :class:`~acip_export.formats.session.RuntimeSession` whose logits are log-probabilities."""

    name = "llama.cpp (xllamacpp server)"

    def __init__(self, export: Path, serving: Serving, threads: int, flash_attention: bool = True) -> None:
        import xllamacpp

        params = server_parameters(export, serving, threads, flash_attention)
        params.verbosity = _SILENT
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # the binding raises whatever its server does
            raise VerificationError(f"llama.cpp cannot load {export}: {error}") from error
        self._vocabulary = 0

    def _next(self, tokens: list[int]) -> Logits:
        """Log-probabilities (vocabulary,) of the token after ``tokens``."""
        wanted = self._vocabulary or 1 << 20
        answer = self._complete(tokens, 1, n_probs=wanted, logprobs=wanted, logit_bias=[[_PLAIN_LETTER, _BIAS]])
        try:
            pairs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError):
            raise VerificationError(
                f"llama.cpp's server gave no log-probabilities after {len(tokens)} tokens"
            ) from None
        self._vocabulary = len(pairs)
        found = np.empty(self._vocabulary, np.float32)
        found[[pair["id"] for pair in pairs]] = [pair["logprob"] for pair in pairs]
        return found

    def _complete(self, tokens: list[int], count: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": tokens, "max_tokens": count, "temperature": 0.0, "ignore_eos": True, **options}
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "choices" not in answer:
            raise VerificationError(f"llama.cpp's server refuses {len(tokens)} tokens: {answer}")
        return answer

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """Log-probabilities, float32 (tokens, vocabulary), for each window of ``windows`` (n, tokens)."""
        for window in windows:
            tokens = [int(token) for token in window]
            yield np.stack([self._next(tokens[: end + 1]) for end in range(len(tokens))])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(self._next(tokens).argmax()))
        return tokens[len(prompt) :]

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        timings = self._complete(prompt, new_tokens, cache_prompt=False)["timings"]
        return Speed(timings["prompt_per_second"], timings["predicted_per_second"], len(prompt), new_tokens)

    def tokenize(self, text: str) -> list[int]:
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback, whatever the environment says
        with direct.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            tokens: list[int] = json.loads(answer.read())["tokens"]
        return tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server = None  # its destructor stops the threads
