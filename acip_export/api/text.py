"""The text that a model and its exports are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import DataError, MissingExtraError, UnsupportedError
from acip_export.formats.session import Windows
from acip_export.model.checkpoint import Checkpoint
from acip_export.text.documents import check_documents
from acip_export.verification import harness
from acip_export.verification.export import EvaluationText

if TYPE_CHECKING:
    from acip_export.text.packing import PackedText

_LONGEST_WINDOW = 1024
_MOST_HELD_OUT, _OPERATIONS = 2048, 2 * 10**12


def evaluation_text(model: Path, text: Path, context: int, most_tokens: int = 32_768) -> EvaluationText:
    """Token windows of a text, at most ``context`` or 1,024 tokens each, and ``most_tokens`` together.

    Longer windows would say little more about an export, and their logits take gigabytes.
    An encoder's are padded texts of up to ``context`` tokens.

    Args:
        model: a model directory or a bundle: its tokenizer is used.

    Raises:
        DataError: missing, not text, or shorter than one window.
    """
    from acip_export.text.packing import pack_text, pad_texts

    if not Checkpoint.open(model).shape.generates:
        padded = pad_texts(model, text, context, least=3)
        return EvaluationText(padded.windows.numpy(), text.name, padded.sha256)
    window = min(context, _LONGEST_WINDOW)
    packed = pack_text(model, text, window)
    windows: Windows = packed.windows[: max(1, most_tokens // window)].numpy()
    return EvaluationText(windows, text.name, packed.sha256)


def check_measurable(text: Path | None, tasks: Sequence[str]) -> None:
    """Look whether what an export is to be measured on is there, before anything is planned or printed.

    Raises:
        DataError: the text is not there. UsageError: nor the file of a task. MissingExtraError: nor what runs tasks.
    """
    if text is not None:
        check_documents(text)
    if tasks:
        harness.require(tasks)


def text_to_measure(
    checkpoint: Checkpoint, scores: ScoreFile, given: Path | None, context: int
) -> EvaluationText | None:
    """The user's text, else what the ranking held out; ``None`` where that is not here.

    Raises:
        DataError: of the text that was given; see :func:`evaluation_text`.
    """
    if given is not None:
        return evaluation_text(checkpoint.path, given, context)
    return held_out_text(checkpoint, scores, context)


def held_out_text(checkpoint: Checkpoint, scores: ScoreFile, context: int) -> EvaluationText | None:
    """Text that the ranking was not calibrated on, which its curve was measured on; ``None`` where it is not here.

    So many tokens that verifying on them takes a minute or two on two cores, windows as of :func:`evaluation_text`.
    """
    data = scores.data
    other = data.evaluation is not None
    text = _ranked_text(checkpoint, scores, data.evaluation)
    if text is None or not data.held_out:
        return None
    kept = text.windows[: data.held_out] if other else text.windows[-data.held_out :]
    window = min(context, _LONGEST_WINDOW, kept.numel())
    parameters = checkpoint.weight_bytes // 2
    count = max(1, min(_MOST_HELD_OUT, _OPERATIONS // (2 * parameters), kept.numel()) // window)
    windows: Windows = kept.flatten()[: count * window].view(count, window).numpy()
    name = f"{Path(data.evaluation or data.source).name}, {'' if other else 'its end, '}held out from the ranking"
    return EvaluationText(windows, name, text.sha256)


def calibration_windows(checkpoint: Checkpoint, scores: ScoreFile, length: int) -> Windows | None:
    """Return windows (n, ``length``) of the text that the ranking was calibrated on; ``None`` where it is not here."""
    text, held_out = _ranked_text(checkpoint, scores, None), scores.data.held_out
    if text is None or not held_out:
        return None
    tokens = (text.windows if scores.data.evaluation is not None else text.windows[:-held_out]).flatten()
    length = min(length, len(tokens))
    windows: Windows = tokens[: len(tokens) // length * length].view(-1, length).numpy()
    return windows


def _ranked_text(checkpoint: Checkpoint, scores: ScoreFile, evaluation: str | None) -> PackedText | None:
    """Return the text of a ranking in its windows, or that other one which it was evaluated on."""
    from acip_export.text.packing import MOST_TOKENS, pack_text

    data, ranked_by = scores.data, scores.ranked_by
    file = _found(evaluation or data.source, scores)
    if file is None or not ranked_by.context or not checkpoint.shape.generates:
        return None
    try:
        if evaluation is not None:
            text = pack_text(checkpoint.path, file, ranked_by.context)
        else:
            most = ranked_by.most_tokens or MOST_TOKENS
            text = pack_text(checkpoint.path, file, ranked_by.context, 1, ranked_by.field, most)
    except (DataError, MissingExtraError, UnsupportedError):
        return None  # nor can it be read here
    # Else another text of the same name.
    return text if text.sha256 == (data.sha256 if evaluation is None else data.evaluation_sha256) else None


def _found(source: str, scores: ScoreFile) -> Path | None:
    """The file of that path, or of that name beside the score file."""
    beside = [] if scores.file is None else [scores.file.parent / Path(source).name]
    return next((file for file in (Path(source), *beside) if file.is_file()), None)
