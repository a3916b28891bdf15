"""Calibration text, split into what the ranking learns from and what its curve is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from acip_export.checkpoint import Checkpoint
from acip_export.errors import DataError
from acip_export.rank.config import DataConfig, ProgressCallback, silent
from acip_export.rank.self_text import SELF, sample_text
from acip_export.text import PackedText, pack_text

_DEFAULT_CONTEXT = 512
_LEAST_WINDOWS = 8
_LARGEST_HELD_OUT_SHARE = 5


@dataclass(frozen=True)
class CalibrationData:
    """Token windows (n, context) int64. ``training`` and ``held_out`` are disjoint stretches of one text.

    Attributes:
        statistics: the first windows of ``training``.
    """

    text: PackedText
    training: Tensor
    held_out: Tensor
    statistics: Tensor


def read_data(
    checkpoint: Checkpoint, source: str | Path, config: DataConfig, evaluation: str | Path | None = None
) -> CalibrationData:
    """Tokenize and split; with an ``evaluation`` text, that is held out and ``source`` is used whole.

    Raises:
        DataError: unreadable text, or less than eight windows of it. MissingExtraError: a package that reads it.
        UnsupportedError: chats for a model without a chat template.
    """
    context = window_length(checkpoint, config)
    text = pack_text(checkpoint.path, source, context, _LEAST_WINDOWS, config.field, config.most_tokens)
    return _split(checkpoint, text, config, evaluation)


def sample_data(
    checkpoint: Checkpoint,
    model: nn.Module,
    config: DataConfig,
    evaluation: str | Path | None = None,
    progress: ProgressCallback = silent,
) -> CalibrationData:
    """:func:`read_data` for text that the model itself samples (``--data self``).

    Raises:
        DataError: ``config.self_tokens`` are less than eight windows.
    """
    context = window_length(checkpoint, config)
    if config.self_tokens < _LEAST_WINDOWS * context:
        raise DataError(
            f"{config.self_tokens:,} tokens of the model's own are asked for, "
            f"at least {_LEAST_WINDOWS * context:,} are needed ({_LEAST_WINDOWS} windows of {context})"
        )
    first = checkpoint.config.get("bos_token_id")
    first = first[0] if isinstance(first, list) else first
    vocabulary = checkpoint.shape.vocabulary
    text = sample_text(model, first, vocabulary, context, config.self_tokens, config.seed, progress)
    return _split(checkpoint, text, config, evaluation)


def is_self(source: str | Path) -> bool:
    """Whether ``source`` asks for the model's own text; a file of that name is ``./self``."""
    return str(source) == SELF and not isinstance(source, Path)


def window_length(checkpoint: Checkpoint, config: DataConfig) -> int:
    """Tokens per window."""
    return min(config.context or _DEFAULT_CONTEXT, checkpoint.shape.max_context)


def _split(
    checkpoint: Checkpoint, text: PackedText, config: DataConfig, evaluation: str | Path | None
) -> CalibrationData:
    context = text.windows.shape[1]
    if evaluation is not None:
        held_out = pack_text(checkpoint.path, evaluation, context).windows[: max(1, config.curve_tokens // context)]
        return _calibration(text, text.windows, held_out, config)
    count = len(text.windows)
    tail = max(1, min(config.curve_tokens // context, count // _LARGEST_HELD_OUT_SHARE))
    return _calibration(text, text.windows[: count - tail], text.windows[count - tail :], config)


def _calibration(text: PackedText, training: Tensor, held_out: Tensor, config: DataConfig) -> CalibrationData:
    windows = max(1, config.statistics_tokens // training.shape[1])
    return CalibrationData(text, training, held_out, training[:windows])


class WindowStream:
    """Batches of windows without end: each pass over the text in a new seeded order.

    ``position`` alone says where the stream stands, so a resumed run sees the same batches.
    """

    def __init__(self, windows: Tensor, batch: int, seed: int, position: int = 0) -> None:
        self.windows, self.batch, self.seed, self.position = windows, min(batch, len(windows)), seed, position

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        per_pass = len(self.windows) // self.batch
        round_, place = divmod(self.position, per_pass)
        generator = torch.Generator().manual_seed(self.seed + round_)
        order = torch.randperm(len(self.windows), generator=generator)
        self.position += 1
        return self.windows[order[place * self.batch : (place + 1) * self.batch]]
