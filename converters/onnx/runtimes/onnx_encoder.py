"""Encoders in plain onnxruntime, CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.artifacts.report import Speed
from acip_export.errors import VerificationError
from acip_export.formats.session import Vectors, encoding_speed
from converters.onnx.runtimes.onnxruntime import open_graph


class OnnxEncoderSession:
    """``onnx/model.onnx``: batches of texts of about the same length, within the planned tokens; an
    :class:`~acip_export.formats.session.EncoderSession`.

    Args and Raises: as :func:`converters.onnx.runtimes.onnxruntime.open_graph`.
    """

    def __init__(self, export: Path, serving: Serving, threads: int = 0) -> None:
        self._session: Any
        self._session, self.name = open_graph(export, threads)
        self._runtime = serving
        names = [output.name for output in self._session.get_outputs()]
        self._output = "sentence_embedding" if "sentence_embedding" in names else names[0]

    def outputs(self, texts: Sequence[list[int]]) -> Vectors:
        """See :class:`acip_export.formats.session.EncoderSession`. Padding takes any token: the mask hides it."""
        rows: dict[int, Vectors] = {}
        waiting = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        longest = max(map(len, texts))
        if longest > self._runtime.context:
            raise VerificationError(f"{longest} tokens do not fit the export's texts of {self._runtime.context}")
        most = self._runtime.prompt_batch
        while waiting:
            # The last of the batch is its longest.
            count = next((n for n in range(len(waiting), 1, -1) if n * len(texts[waiting[n - 1]]) <= most), 1)
            batch, waiting = waiting[:count], waiting[count:]
            length = len(texts[batch[-1]])
            ids, mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
            for row, index in enumerate(batch):
                ids[row, : len(texts[index])] = texts[index]
                mask[row, : len(texts[index])] = 1
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            (found,) = self._session.run([self._output], inputs)
            for row, index in enumerate(batch):
                rows[index] = found[row] if found.ndim == 2 else found[row, : len(texts[index])].mean(0)
        return np.stack([rows[index] for index in range(len(texts))])

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:  # noqa: ARG002 - nothing is generated
        """See :class:`acip_export.formats.session.ProbedSession`."""
        return encoding_speed(self, prompt, self._runtime.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None
