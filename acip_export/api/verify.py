"""Verify exports made earlier, and the text to verify on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from acip_export.api.export import planned_model, roundings_left
from acip_export.api.opening import Location, another_model, open_model, open_scores
from acip_export.api.text import check_measurable, evaluation_text, held_out_text
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.export_directory import claim_papers, load_export_plan, settle_mark
from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import Report, save_report
from acip_export.artifacts.scores import ScoreFile
from acip_export.artifacts.tuned import load_tuned
from acip_export.errors import CheckpointError, ScoreFileError
from acip_export.io.scratch import Scratch
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.verification import export as verification
from acip_export.verification.export import EvaluationText
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS


def verify_directory(
    export: Path,
    model: Location | Checkpoint,
    scores: Location | ScoreFile | None,
    bundle: Path | None,
    text: Path | None,
    tasks: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    progress: ProgressCallback = silent,
) -> Report:
    """Verify an export made earlier, and write its ``report.json``.

    Without a bundle its tensors are made again, as they are needed. With one, the model may be absent: then nothing is
    compared with the dense model.

    Raises:
        UsageError: ``export`` has a report, page or card that is not ours. PlanFileError: it has no plan.
        BundleError: the bundle is damaged. ScoreFileError, CheckpointError: its tensors cannot be made again.
        Others as :func:`acip_export.verification.export.verify_export`.
    """
    scores_file = scores.file if isinstance(scores, ScoreFile) else scores
    plan = load_export_plan(export)
    check_measurable(text, tasks)
    claim_papers(export, (scores_file, bundle, text, *tasks))
    checkpoint = _base_model(model, plan, required=bundle is None)
    with ExitStack() as stack:
        if bundle is not None:
            made_of: MaterializedModel = Bundle.open(bundle, verify_hash=True)
        else:
            assert checkpoint is not None
            opened, scratch = open_scores(checkpoint, scores), Scratch(None, "a plan's factors")
            kept = stack.enter_context(roundings_left(export, plan, opened))
            made_of = planned_model(checkpoint, opened, plan, scratch, kept=kept, tuned=load_tuned(export, plan))
        report = verification.verify_export(
            export,
            made_of,
            text=_text(text, made_of.path, plan, checkpoint, scores),
            dense=None if checkpoint is None else checkpoint.path,
            tasks=tasks,
            timeout=timeout,
            progress=progress,
        )
    save_report(report, export)
    settle_mark(export, report.failures)
    return report


def _text(
    given: Path | None,
    tokenizer: Path,
    plan: Plan,
    checkpoint: Checkpoint | None,
    scores: Location | ScoreFile | None,
) -> EvaluationText | None:
    """The user's text, else what the ranking held out, where model and score file are here."""
    if given is not None:
        return evaluation_text(tokenizer, given, plan.serving.context)
    if checkpoint is None:
        return None
    try:
        opened = open_scores(checkpoint, scores)
    except ScoreFileError:
        return None
    return held_out_text(checkpoint, opened, plan.serving.context)


def _base_model(model: Location | Checkpoint, plan: Plan, required: bool) -> Checkpoint | None:
    """The model that was planned for, or ``None`` if something else is there and it is not ``required``."""
    try:
        checkpoint = open_model(model)
    except CheckpointError:
        if required:
            raise
        return None
    if checkpoint.fingerprint == plan.model_fingerprint:
        return checkpoint
    if required:
        raise another_model(checkpoint, plan)
    return None
