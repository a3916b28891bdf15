"""ONNX exports in onnxruntime-genai, as applications run them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import MissingExtraError, VerificationError
from acip_export.formats.session import Logits, Windows


class GenaiSession:
    """Opens an export directory through its ``genai_config.json``.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
        VerificationError: it refuses the directory.
    """

    def __init__(self, export: Path, serving: Serving, threads: int | None = None) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise MissingExtraError("onnxruntime-genai", "onnx", "running an ONNX export") from error
        self._genai: Any = onnxruntime_genai
        try:
            config = onnxruntime_genai.Config(str(export))
            # Graphs for graphics cards are verified on the processor, which computes the same operators.
            config.clear_providers()
            if threads:
                options = {"intra_op_num_threads": threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model: Any = onnxruntime_genai.Model(config)
            # Not used here; applications do, and its tables are a part of what the process takes.
            self._tokenizer: Any = onnxruntime_genai.Tokenizer(self._model)
        except Exception as error:  # it raises RuntimeError and its kin for whatever is wrong with the directory
            raise VerificationError(f"onnxruntime-genai cannot open {export}: {error}") from error
        self.name = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        # genai keeps the logits of the last chunk only, so prompts are handed over chunk by chunk.
        self._batch = serving.prompt_batch

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        for window in windows:
            generator = self._generator()
            pieces = []
            for start in range(0, len(window), self._batch):
                generator.append_tokens(window[start : start + self._batch].astype(np.int32))
                pieces.append(np.array(generator.get_output("logits")[0], np.float32))
            yield np.concatenate(pieces)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See :class:`acip_export.formats.session.RuntimeSession`.

        Tokens are chosen here: genai's own loop stops at the end-of-text token and does nothing from there on.
        """
        generator = self._generator()
        pending, new = list(prompt), list[int]()
        while len(new) < count:
            generator.append_tokens(np.array(pending, np.int32))
            pending = [int(generator.get_logits().reshape(-1).argmax())]
            new += pending
        return new

    def tokenize(self, text: str) -> list[int]:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        self._tokenizer.update_options(add_special_tokens="false")
        return [int(token) for token in self._tokenizer.encode(text)]

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        generator = self._generator()
        start = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        middle = time.perf_counter()
        # Not generate_next_token: what it computes is the token before, so that the first one would cost nothing.
        for index in range(new_tokens):
            generator.append_tokens(np.array([index % 7], np.int32))
        end = time.perf_counter()
        return Speed(len(prompt) / (middle - start), new_tokens / (end - middle), len(prompt), new_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tokenizer = self._model = None

    def _generator(self) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False)
        return self._genai.Generator(self._model, parameters)
