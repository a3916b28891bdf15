"""Language models in their runtimes: logits against the reference's, and what a text costs against the dense model.

Every runtime runs in processes of its own. Between them the references have the machine for themselves, and pass all
windows block by block; when logits are compared, a reference is no more than hidden states and its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.report import Agreement, Divergence, Perplexity
from acip_export.errors import DataError
from acip_export.formats.protocol import ExportFormat
from acip_export.formats.session import Logits, Tokens, Windows
from acip_export.progress import Progress, ProgressCallback
from acip_export.text.packing import load_tokenizer
from acip_export.verification import metrics
from acip_export.verification.metrics import Floats
from acip_export.verification.process import ProcessFigures, logits_of_process, measure_process
from acip_export.verification.sentences import SENTENCES
from acip_export.verification.tokens import STRINGS

# Agreement with the bundle is one of rounding in another order, or of activations: few tokens tell.
_AGREEMENT_TOKENS = 512
# Without a text: that many windows of our own sentences, so long.
_OWN_WINDOWS, _OWN_TOKENS = 2, 48
# What a process that starts, loads and is measured counts as.
_PROCESS_WINDOWS = 4
_PROMPT_TOKENS, _GREEDY_TOKENS = 16, 16


@dataclass(frozen=True)
class RuntimeFigures:
    """What one runtime's export is like.

    Attributes:
        process: its own figures. agreement: with the bundle.
    """

    process: ProcessFigures
    agreement: Agreement


@dataclass(frozen=True)
class QualityFigures:
    """What the first runtime's export makes of a text.

    Attributes:
        divergence, dense: ``None`` without the dense model. bundle: on the windows that agreement was measured on.
    """

    export: Perplexity
    divergence: Divergence | None
    dense: Perplexity | None
    bundle: Perplexity


@dataclass(frozen=True)
class DecoderFigures:
    """What an export of a language model is like: ``runtimes`` in the format's order, ``quality`` where text is."""

    runtimes: tuple[RuntimeFigures, ...]
    quality: QualityFigures | None


def verify_decoder(
    export: Path,
    model: MaterializedModel,
    written_as: ExportFormat,
    text: Windows | None,
    dense: Path | None,
    timeout: float,
    progress: ProgressCallback,
    cache: Path | None,
    measured_all: Callable[[Sequence[ProcessFigures]], None] = lambda _figures: None,
) -> DecoderFigures:
    """Open the export in every runtime of its format and compare.

    Args:
        text: windows to measure quality on; agreement is measured on the first of them, else on sentences of our own.
        dense: the base model, for quality. cache: directory that keeps its states on a text for other exports.
        measured_all: told what the runtimes' processes took, before anything is compared, which takes longer.

    Raises:
        As :func:`acip_export.verification.process.measure_process`.
    """
    from acip_export.verification.reference import open_reference, pass_dense

    context = model.plan.serving.context
    compared = _own_windows(model) if text is None else _first_windows(text)
    prompt = [int(token) for token in compared[0][: max(1, min(_PROMPT_TOKENS, compared.shape[1] // 3))]]
    runtimes_read = [len(compared if text is None or number else text) for number in range(len(written_as.sessions))]
    compares_dense = text is not None and dense is not None
    steps = _Steps(
        progress,
        model.as_checkpoint().shape.layers,
        len(runtimes_read) * _PROCESS_WINDOWS
        + len(compared)
        + len(runtimes_read)
        + (len(text) if text is not None and compares_dense else 0)
        + sum(runtimes_read),
    )
    figures = []
    for session in written_as.sessions:
        steps.begin(f"{session.runtime}, in a process of its own")
        count = min(_GREEDY_TOKENS, context - len(prompt))
        figures.append(measure_process(session.module, session.name, export, timeout, prompt, count, STRINGS))
        steps.windows(_PROCESS_WINDOWS)
    measured_all(figures)
    continued = [np.array([*prompt, *measured.greedy], np.int64) for measured in figures]
    steps.begin("bundle, block by block")
    of_bundle = open_reference(model, written_as.round_trip).passed(
        [*compared, *continued], steps.blocks(len(compared) + len(continued))
    )
    of_dense = None
    if text is not None and dense is not None:
        steps.begin("dense model, block by block")
        of_dense = pass_dense(dense, list(text), cache, steps.blocks(len(text)))
    # After each of the runtime's tokens, the bundle's next one: the same as its own continuation up to a difference.
    expected = [
        [int(token) for token in logits[len(prompt) - 1 : -1].argmax(-1)] for logits in of_bundle.logits(len(compared))
    ]
    runtimes: list[RuntimeFigures] = []
    quality: _Quality | None = None
    for session, measured, tokens in zip(written_as.sessions, figures, expected, strict=True):
        steps.begin(f"{measured.runtime}: logits")
        windows = compared if text is None or runtimes else text
        with logits_of_process(session.module, session.name, export, windows, timeout) as found:
            found = _watched(found, windows, lambda _logits, _window: steps.windows(1))
            reference = of_bundle.logits(0, len(compared))
            if text is not None and quality is None:
                quality = _Quality(None if of_dense is None else of_dense.logits())
                found = _watched(found, text, quality.add)
                reference = _watched(reference, compared, quality.add_bundle)
            agreement = metrics.compare_logits(reference, islice(found, len(compared)), (tokens, list(measured.greedy)))
            for _ in found:
                pass
        runtimes.append(RuntimeFigures(measured, agreement))
    return DecoderFigures(tuple(runtimes), None if quality is None else quality.figures())


class _Steps:
    """Report how far it is, in windows that pass a block; a window's logits count as all blocks.

    Args:
        blocks: of the model. windows: that pass in all, a process of its own as some.
    """

    def __init__(self, progress: ProgressCallback, blocks: int, windows: int) -> None:
        self._progress, self._blocks = progress, blocks
        self._done, self._total, self._item = 0, blocks * windows, ""

    def begin(self, item: str) -> None:
        """Say what comes now."""
        self._item = item
        self._advance(0)

    def windows(self, count: int) -> None:
        """Note that so many windows are through."""
        self._advance(count * self._blocks)

    def blocks(self, windows: int) -> Callable[[], None]:
        """Return what to call when all ``windows`` are through one block."""
        return lambda: self._advance(windows)

    def _advance(self, steps: int) -> None:
        self._done += steps
        self._progress(Progress("verify", self._done, self._total, self._item))


class _Quality:
    """What a text costs: collected window by window, so that nobody has to keep logits.

    Args:
        dense: logits of the dense model, if it is here.
    """

    def __init__(self, dense: Iterator[Logits] | None) -> None:
        self._dense = dense
        self._columns: list[Floats] = []
        self._bundle_losses: list[Floats] = []

    def add(self, logits: Logits, window: Tokens) -> None:
        """Of the export."""
        if self._dense is None:
            self._columns.append(metrics.token_losses(logits, window))
        else:
            self._columns.append(metrics.token_figures(next(self._dense), logits, window))

    def add_bundle(self, logits: Logits, window: Tokens) -> None:
        """Of the bundle."""
        self._bundle_losses.append(metrics.token_losses(logits, window))

    def figures(self) -> QualityFigures:
        """Of all windows."""
        bundle = metrics.perplexity(self._bundle_losses)
        if self._dense is None:
            return QualityFigures(metrics.perplexity(self._columns), None, None, bundle)
        dense, own, divergence = metrics.compare_with_dense(self._columns)
        return QualityFigures(own, divergence, dense, bundle)


def _watched(logits: Iterator[Logits], windows: Windows, note: Callable[[Logits, Tokens], None]) -> Iterator[Logits]:
    """Pass on logits, having shown them. Nothing is held of a window when the next is computed."""
    for window in windows:
        found = next(logits)
        note(found, window)
        yield found
        del found


def _own_windows(model: MaterializedModel) -> Windows:
    """Sentences of our own, or without a tokenizer tokens from all over the vocabulary."""
    context = model.plan.serving.context
    try:
        tokens: list[int] = load_tokenizer(model.path)(" ".join(SENTENCES))["input_ids"]
    except DataError:
        count = _OWN_WINDOWS * _OWN_TOKENS
        tokens = [index * model.as_checkpoint().shape.vocabulary // count for index in range(count)]
    length = min(_OWN_TOKENS, context, len(tokens))
    count = min(_OWN_WINDOWS, len(tokens) // length)
    return np.array(tokens[: count * length], np.int64).reshape(count, length)


def _first_windows(text: Windows) -> Windows:
    found: Windows = text[: max(1, _AGREEMENT_TOKENS // text.shape[1])]
    return found
