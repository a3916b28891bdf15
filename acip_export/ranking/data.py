"""Split calibration text into what the ranking learns from and what its curve is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acip_export.errors import DataError, UnsupportedError
from acip_export.io.kept_work import Work
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import Encoder
from acip_export.progress import ProgressCallback, silent
from acip_export.ranking.config import DataConfig
from acip_export.ranking.load import linear_weights
from acip_export.ranking.self_text import SELF, sample_text
from acip_export.ranking.tasks import CAUSAL, MaskedTask, Task, task_of
from acip_export.text.packing import PackedText, load_tokenizer, pack_text, pad_texts

_DEFAULT_CONTEXT = 512
_LEAST_WINDOWS = 8
_LARGEST_HELD_OUT_SHARE = 5
# Pairs of held-out texts need texts: a fifth of these is four.
_LEAST_TEXTS = 20
_MASKED_SHARE = 0.15


@dataclass(frozen=True)
class CalibrationData:
    """Hold token windows (n, context) int64. ``training`` and ``held_out`` are disjoint stretches of one text.

    Attributes:
        statistics: the first windows of ``training``. graded: how many of these gradients are measured on, all if
            there are fewer. task: what the model is for.
        evaluation: the text that is held out, if it is another one.
    """

    text: PackedText
    training: Tensor
    held_out: Tensor
    statistics: Tensor
    graded: int
    task: Task = CAUSAL
    evaluation: PackedText | None = None


def read_data(
    checkpoint: Checkpoint, source: str | Path, config: DataConfig, evaluation: str | Path | None = None
) -> CalibrationData:
    """Tokenize and split the text; with an ``evaluation`` text, that is held out and ``source`` is used whole.

    Raises:
        DataError: unreadable text, or less than eight windows of it. MissingExtraError: a package that reads it.
        UnsupportedError: chats for a model without a chat template.
    """
    config = config.for_weights(linear_weights(checkpoint))
    encoder = checkpoint.encoder
    if encoder is not None:
        return _texts(checkpoint.path, encoder, source, config, evaluation)
    context = window_length(checkpoint, config)
    text = pack_text(checkpoint.path, source, context, _LEAST_WINDOWS, config.field, config.most_tokens)
    return _split(checkpoint, text, config, evaluation)


def sample_data(
    checkpoint: Checkpoint,
    model: nn.Module,
    config: DataConfig,
    evaluation: str | Path | None = None,
    progress: ProgressCallback = silent,
    work: Work | None = None,
) -> CalibrationData:
    """Do as :func:`read_data` with text that the model itself samples (``--data self``), and that ``work`` keeps.

    Raises:
        DataError: ``config.self_tokens`` are less than eight windows. UnsupportedError: an encoder, which samples none.
    """
    if checkpoint.encoder is not None:
        raise UnsupportedError("an encoder generates no text; give it some with  --data FILE, one text a line")
    config = config.for_weights(linear_weights(checkpoint))
    context = window_length(checkpoint, config)
    if config.self_tokens < _LEAST_WINDOWS * context:
        raise DataError(
            f"{config.self_tokens:,} tokens of the model's own are asked for, "
            f"at least {_LEAST_WINDOWS * context:,} are needed ({_LEAST_WINDOWS} windows of {context})"
        )
    first = checkpoint.config.get("bos_token_id")
    first = first[0] if isinstance(first, tuple) else first
    vocabulary = checkpoint.shape.vocabulary
    text = sample_text(model, first, vocabulary, context, config.self_tokens, config.seed, progress, work)
    return _split(checkpoint, text, config, evaluation)


def is_self(source: str | Path) -> bool:
    """Tell whether ``source`` asks for the model's own text; a file of that name is ``./self``."""
    return str(source) == SELF and not isinstance(source, Path)


def window_length(checkpoint: Checkpoint, config: DataConfig) -> int:
    """Return the tokens per window."""
    return min(config.context or _DEFAULT_CONTEXT, checkpoint.shape.max_context)


def _split(
    checkpoint: Checkpoint, text: PackedText, config: DataConfig, evaluation: str | Path | None
) -> CalibrationData:
    context = text.windows.shape[1]
    if evaluation is not None:
        other = pack_text(checkpoint.path, evaluation, context)
        held_out = other.windows[: max(1, config.curve_tokens // context)]
        return replace(_calibration(text, text.windows, held_out, config), evaluation=other)
    count = len(text.windows)
    tail = max(1, min(config.curve_tokens // context, count // _LARGEST_HELD_OUT_SHARE))
    return _calibration(text, text.windows[: count - tail], text.windows[count - tail :], config)


def _calibration(text: PackedText, training: Tensor, held_out: Tensor, config: DataConfig) -> CalibrationData:
    windows, graded = (max(1, tokens // training.shape[1]) for tokens in _tokens(config))
    return CalibrationData(text, training, held_out, training[:windows], graded)


def _tokens(config: DataConfig) -> tuple[int, int]:
    """Return those of inputs and of gradients, which are among them."""
    assert config.statistics_tokens is not None and config.gradient_tokens is not None  # for_weights has set them
    return config.statistics_tokens, min(config.gradient_tokens, config.statistics_tokens)


def _texts(
    model: Path, encoder: Encoder, source: str | Path, config: DataConfig, evaluation: str | Path | None
) -> CalibrationData:
    """Split the same way for an encoder, whose windows are padded texts."""
    tokenizer = load_tokenizer(model)
    if encoder.kind == "masked-lm" and tokenizer.mask_token_id is None:
        raise DataError(f"the tokenizer of {model} has no mask token, so its masked language model cannot be ranked")
    task = task_of(encoder, {"pad": tokenizer.pad_token_id, "mask": tokenizer.mask_token_id})
    length = min(config.context or encoder.max_length, encoder.max_length)

    def windows(file: str | Path, least: int) -> PackedText:
        text = pad_texts(model, file, length, least, config.field, config.most_tokens)
        if isinstance(task, MaskedTask):
            text = replace(text, windows=_masked(text.windows, tokenizer, config.seed))
        return text

    text = windows(source, _LEAST_TEXTS)
    if evaluation is not None:
        training, held_out = text.windows, windows(evaluation, _LEAST_TEXTS).windows
        held_out = held_out[: _texts_of(task, held_out, config.curve_tokens)]
    else:
        count = len(text.windows)
        reversed_ = text.windows.flip(0)
        tail = min(_texts_of(task, reversed_, config.curve_tokens), count // _LARGEST_HELD_OUT_SHARE)
        training, held_out = text.windows[: count - tail], text.windows[count - tail :]
    statistics, graded = (_texts_of(task, training, tokens) for tokens in _tokens(config))
    return CalibrationData(text, training, held_out, training[:statistics], graded, task)


def _texts_of(task: Task, windows: Tensor, tokens: int) -> int:
    """Count the texts from the front that have ``tokens`` tokens together, at least four."""
    counts = torch.tensor([task.tokens(window) for window in windows])
    return max(_LEAST_TEXTS // _LARGEST_HELD_OUT_SHARE, int((counts.cumsum(0) <= tokens).sum()))


def _masked(windows: Tensor, tokenizer: Any, seed: int) -> Tensor:
    """Replace 15 % of the tokens that are not special by the mask token (BERT's share), at least one of each text."""
    special = torch.isin(windows, torch.tensor(tokenizer.all_special_ids))
    draws = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(special, 2.0)
    chosen = draws < _MASKED_SHARE
    chosen[torch.arange(len(windows)), draws.argmin(1)] = True
    return torch.where(chosen & ~special, tokenizer.mask_token_id, windows)


class WindowStream:
    """Yield batches of windows without end: each pass over the text in a new seeded order.

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
