"""ONNX exports in plain onnxruntime, CPU, with the KV cache passed in and out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from acip_export.errors import MissingExtraError, VerificationError
from acip_export.plans import Runtime
from acip_export.verify.runtime import Logits, Speed, Windows
from converters.onnx.consumers import MODEL_FILE

_REPETITIONS = 3

Cache = dict[str, Any]


class OnnxRuntimeSession:
    """Opens ``onnx/model.onnx`` of an export. Prompts go through in pieces of ``runtime.prompt_batch`` tokens.

    Args:
        threads: of one operator; 0 leaves the choice to onnxruntime.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        VerificationError: onnxruntime refuses the graph.
    """

    def __init__(self, export: Path, runtime: Runtime, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx", "running an ONNX export") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(export / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exception classes are private, and all mean that the file does not run
            raise VerificationError(f"onnxruntime cannot open {export / MODEL_FILE}: {error}") from error
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self._batch, self._context = runtime.prompt_batch, runtime.context
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._empty: Cache = {
            node.name: np.zeros(
                (1, node.shape[1], 0, node.shape[3]), np.float16 if node.type == "tensor(float16)" else np.float32
            )
            for node in self._session.get_inputs()
            if node.name.startswith("past_key_values.")
        }

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """See :class:`acip_export.verify.runtime.RuntimeSession`."""
        for window in windows:
            scores, _ = self._prefill([int(token) for token in window])
            yield scores

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See :class:`acip_export.verify.runtime.RuntimeSession`."""
        scores, cache = self._prefill(prompt)
        new = [int(scores[-1].argmax())]
        while len(new) < count:
            scores, cache = self._step(new[-1:], cache, len(prompt) + len(new) - 1)
            new.append(int(scores[-1].argmax()))
        return new[:count]

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """See :class:`acip_export.verify.runtime.RuntimeSession`."""
        prompt = [index % 7 for index in range(prompt_tokens)]
        new_tokens = min(new_tokens, self._context - prompt_tokens)
        prefill, decode = [], []
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            _, cache = self._prefill(prompt)
            middle = time.perf_counter()
            for index in range(new_tokens):
                _, cache = self._step([index % 7], cache, prompt_tokens + index)
            prefill.append(middle - start)
            decode.append(time.perf_counter() - middle)
        return Speed(prompt_tokens / min(prefill), new_tokens / min(decode))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None

    def _prefill(self, tokens: list[int]) -> tuple[Logits, Cache]:
        pieces, cache = [], self._empty
        for start in range(0, len(tokens), self._batch):
            scores, cache = self._step(tokens[start : start + self._batch], cache, start)
            pieces.append(scores)
        return np.concatenate(pieces), cache

    def _step(self, tokens: list[int], cache: Cache, position: int) -> tuple[Logits, Cache]:
        end = position + len(tokens)
        values = self._session.run(
            self._outputs,
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(position, end, dtype=np.int64)[None],
                **cache,
            },
        )
        found = dict(zip(self._outputs, values, strict=True))
        scores: Logits = found.pop("logits")[0].astype(np.float32, copy=False)
        return scores, {name.replace("present.", "past_key_values."): value for name, value in found.items()}
