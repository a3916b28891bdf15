"""Language models in their runtimes: logits against the reference's, and what a text costs against the dense model.

Every runtime runs in processes of its own. Between them the references have the machine for themselves, and pass all
windows block by block; when logits are compared, a reference is no more than hidden states and its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import Agreement, Divergence, Perplexity
from acip_export.errors import DataError
from acip_export.formats.protocol import ExportFormat
from acip_export.formats.session import Logits, Tokens, Windows
from acip_export.io.kept_states import KeptStates
from acip_export.io.stamps import stamp_of
from acip_export.progress import Progress, ProgressCallback
from acip_export.text.packing import load_tokenizer
from acip_export.verification import metrics
from acip_export.verification.metrics import Floats
from acip_export.verification.process import ProcessFigures, logits_of_process, measure_process
from acip_export.verification.sentences import SENTENCES
from acip_export.verification.tokens import STRINGS
from acip_export.verification.unfinished import Unfinished, digest_of

if TYPE_CHECKING:
    from acip_export.verification.reference import Passed

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
    unfinished: Unfinished,
    hashes: Callable[[], Mapping[str, str]],
    measured_all: Callable[[Sequence[ProcessFigures]], None] = lambda _figures: None,
) -> DecoderFigures:
    """Open the export in every runtime of its format and compare.

    Args:
        text: windows to measure quality on; agreement is measured on the first of them, else on sentences of our own.
        dense: the base model, for quality. cache: directory that keeps its states on a text for other exports.
        unfinished: keeps what takes long. hashes: SHA-256 of the export's files, asked for when the processes are
            measured: reading files changes how the system holds them.
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
    stamp = _stamp(export, model.plan)
    for number, session in enumerate(written_as.sessions):
        steps.begin(f"{session.runtime}, in a process of its own")
        count = min(_GREEDY_TOKENS, context - len(prompt))
        measure = partial(measure_process, session.module, session.name, export, timeout, prompt, count, STRINGS)
        origin = f"{stamp} {prompt} {count}"
        figures.append(unfinished.figures(f"process {number + 1}", origin, ProcessFigures, measure))
        steps.windows(_PROCESS_WINDOWS)
    measured_all(figures)
    continued = [np.array([*prompt, *measured.greedy], np.int64) for measured in figures]
    steps.begin("bundle, block by block")
    passing = [*compared, *continued]
    of_bundle = open_reference(model, written_as.round_trip, unfinished).passed(
        passing, steps.blocks(len(passing)), unfinished.states("bundle", digest_of(passing), "block")
    )
    of_dense = None
    if text is not None and dense is not None:
        steps.begin("dense model, block by block")
        of_dense = pass_dense(dense, list(text), cache, steps.blocks(len(text)), unfinished)
    # After each of the runtime's tokens, the bundle's next one: the same as its own continuation up to a difference.
    expected = [
        [int(token) for token in logits[len(prompt) - 1 : -1].argmax(-1)] for logits in of_bundle.logits(len(compared))
    ]
    runtimes: list[RuntimeFigures] = []
    quality: QualityFigures | None = None
    for number, (session, measured, tokens) in enumerate(zip(written_as.sessions, figures, expected, strict=True)):
        steps.begin(f"{measured.runtime}: logits")
        of_text = text if not number else None
        windows = compared if of_text is None else of_text
        against = of_dense if of_text is not None else None
        origin = f"{sorted(hashes().items())} {measured.runtime} {digest_of(windows)} {against is not None}"
        found = _Windows(unfinished.states(f"logits {number + 1}", origin, "window"), of_text is not None)
        steps.windows(found.count)
        if found.count < len(windows):
            rest = windows[found.count :]
            references = _references(of_bundle, len(compared), against, found.count)
            with logits_of_process(session.module, session.name, export, rest, timeout) as of_export:
                for window in rest:
                    found.add(window, next(of_export), *next(references))
                    steps.windows(1)
        runtimes.append(RuntimeFigures(measured, found.agreement((tokens, list(measured.greedy)))))
        quality = quality or found.quality()
    return DecoderFigures(tuple(runtimes), quality)


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


class _Windows:
    """What comparing windows with references gave, window by window, so that nobody has to keep logits.

    Args:
        kept: read and filled. quality: measure what the text costs, too.

    Attributes:
        count: of windows that are compared.
    """

    def __init__(self, kept: KeptStates, quality: bool) -> None:
        self._kept, self._quality = kept, quality
        self.count = kept.blocks
        self._figures = {name: tensor.numpy() for name, tensor in kept.restored().items()}

    def add(self, window: Tokens, logits: Logits, bundle: Logits | None, dense: Logits | None) -> None:
        """Compare the next one.

        Args:
            logits: of the export. bundle: for agreement, which is measured on some windows only.
        """
        found = {} if bundle is None else {"agreement": metrics.window_agreement(bundle, logits)}
        if self._quality:
            if bundle is not None:
                found["bundle"] = metrics.token_losses(bundle, window)
            if dense is None:
                found["export"] = metrics.token_losses(logits, window)
            else:
                found["against dense"] = metrics.token_figures(dense, logits, window)
        import torch

        self._figures |= {f"{name} {self.count}": figures for name, figures in found.items()}
        self.count += 1
        self._kept.passed(self.count, {name: torch.from_numpy(each) for name, each in self._figures.items()})

    def agreement(self, greedy: tuple[list[int], list[int]]) -> Agreement:
        """Of all windows; ``greedy`` as :func:`acip_export.verification.metrics.agreement`."""
        return metrics.agreement(self._of("agreement"), greedy)

    def quality(self) -> QualityFigures | None:
        """Of all windows."""
        if not self._quality:
            return None
        bundle, compared = metrics.perplexity(self._of("bundle")), self._of("against dense")
        if not compared:
            return QualityFigures(metrics.perplexity(self._of("export")), None, None, bundle)
        dense, own, divergence = metrics.compare_with_dense(compared)
        return QualityFigures(own, divergence, dense, bundle)

    def _of(self, name: str) -> list[Floats]:
        keys = (f"{name} {number}" for number in range(self.count))
        return [self._figures[key] for key in keys if key in self._figures]


def _references(
    of_bundle: Passed, count: int, of_dense: Passed | None, behind: int
) -> Iterator[tuple[Logits | None, Logits | None]]:
    """Yield for each window but the first ones the bundle's logits, if it is one of ``count``, and the dense model's.

    Nothing is held of a window when the next is computed.
    """
    bundle = of_bundle.logits(behind, count) if behind < count else iter(())
    dense = None if of_dense is None else of_dense.logits(behind)
    while True:
        yield next(bundle, None), None if dense is None else next(dense)


def _stamp(export: Path, plan: Plan) -> str:
    """Return what tells, without reading them, whether an export's files are the same."""
    return str([(name, stamp_of(export / name)) for name in sorted(plan.files)])


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
