"""ONNX exports in plain onnxruntime, CPU, with the KV cache passed in and out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import MissingExtraError, VerificationError
from acip_export.formats.session import Logits, Windows
from acip_export.io.inputs import read_json
from converters.onnx.companion_files import GENAI_CONFIG, MODEL_FILE

Cache = dict[str, Any]

_NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,  # two of 4 bits
}


class _Search(msgspec.Struct, frozen=True):
    past_present_share_buffer: bool


class _GenaiConfig(msgspec.Struct, frozen=True):
    """How the cache is kept, of ``genai_config.json``."""

    search: _Search


def _in_place(export: Path) -> bool:
    """As genai is told."""
    file = export / GENAI_CONFIG
    return read_json(file, _GenaiConfig, VerificationError).search.past_present_share_buffer


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def open_graph(export: Path, threads: int) -> tuple[Any, str]:
    """An ``InferenceSession`` of an export's graph on the CPU, and the runtime's name and version.

    Args:
        threads: of one operator; 0 leaves the choice to onnxruntime.

    Raises:
        MissingExtraError: onnxruntime is not installed. VerificationError: it refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "running an ONNX export") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = export / MODEL_FILE
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes are private, and all mean that the file does not run
        raise VerificationError(f"onnxruntime cannot open {file}: {error}") from error
    return session, f"onnxruntime {onnxruntime.__version__}"


class OnnxRuntimeSession:
    """Opens ``onnx/model.onnx`` of an export. Prompts go through in pieces of ``serving.prompt_batch`` tokens.

    Args and Raises: as :func:`open_graph`.
    """

    def __init__(self, export: Path, serving: Serving, threads: int = 0) -> None:
        self._session: Any
        self._session, self.name = open_graph(export, threads)
        from onnxruntime import OrtValue

        self._batch, self._context = serving.prompt_batch, serving.context
        # One cache for the whole context, read and written in place, as applications do: passing arrays in and out
        # would hold it twice. Graphs whose attention is not fused cannot do better.
        self._in_place = _in_place(export)
        inputs = self._session.get_inputs()
        self._with_positions = any(node.name == "position_ids" for node in inputs)
        self._caches: Cache = {
            node.name: OrtValue.ortvalue_from_shape_and_type(
                [1, node.shape[1], serving.context if self._in_place else 0, node.shape[3]],
                _NUMBERS[node.type],
            )
            for node in inputs
            if node.name.startswith("past_key_values.")
        }
        self._empty = dict(self._caches)
        self._binding: Any = self._session.io_binding()
        self._binding.bind_output("logits", "cpu")  # first, so that it is the first of the outputs
        for name, cache in self._caches.items():
            self._binding.bind_ortvalue_input(name, cache)
            if self._in_place:
                self._binding.bind_ortvalue_output(_present(name), cache)

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        for window in windows:
            yield np.concatenate([self._scores() for _ in self._feed([int(token) for token in window])])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        for _ in self._feed(prompt):
            pass
        new = [int(self._scores()[-1].argmax())]
        while len(new) < count:
            self._step(new[-1:], len(prompt) + len(new) - 1)
            new.append(int(self._scores()[-1].argmax()))
        return new[:count]

    def tokenize(self, text: str) -> None:
        """Return nothing: onnxruntime reads token ids."""

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        """See :class:`acip_export.formats.session.RuntimeSession`."""
        start = time.perf_counter()
        for _ in self._feed(prompt):
            pass
        middle = time.perf_counter()
        for index in range(new_tokens):
            self._step([index % 7], len(prompt) + index)
        end = time.perf_counter()
        return Speed(len(prompt) / (middle - start), new_tokens / (end - middle), len(prompt), new_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._binding = self._session = None

    def _feed(self, tokens: list[int]) -> Iterator[None]:
        """Process ``tokens`` from the start of the cache, a prompt batch at a time."""
        for start in range(0, len(tokens), self._batch):
            self._step(tokens[start : start + self._batch], start)
            yield

    def _step(self, tokens: list[int], position: int) -> None:
        end = position + len(tokens)
        if end > self._context:
            raise VerificationError(f"{end} tokens do not fit the export's context of {self._context}")
        self._binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        if self._with_positions:
            self._binding.bind_cpu_input("position_ids", np.arange(position, end, dtype=np.int64)[None])
        self._binding.bind_output("logits", "cpu")  # bound anew: its shape changes
        if not self._in_place:
            for name, cache in (self._caches if position else self._empty).items():
                self._binding.bind_ortvalue_input(name, cache)
                self._binding.bind_output(_present(name), "cpu")
        self._session.run_with_iobinding(self._binding)
        if not self._in_place:
            self._caches = dict(zip(self._caches, self._binding.get_outputs()[1:], strict=True))

    def _cut(self, tokens: int) -> None:
        """Keep the first ``tokens`` of a cache that grows."""
        from onnxruntime import OrtValue

        self._caches = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cache.numpy()[:, :, :tokens]))
            for name, cache in self._caches.items()
        }

    def _scores(self) -> Logits:
        """Of the last step: float32 (tokens, vocabulary), copied."""
        scores: Logits = np.array(self._binding.get_outputs()[0].numpy()[0], np.float32)
        return scores
