"""From a plan to the files that a runtime opens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from acip_export.api.plan import planned_sizes
from acip_export.api.rank import rounding_scores
from acip_export.api.report import write_report
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.export_directory import EXPORT_KIND
from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import Report, save_report
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import VerificationError
from acip_export.formats.registry import export_format
from acip_export.io.atomic import scratch_directory
from acip_export.io.outputs import claim_output
from acip_export.kept_roundings import KeptRoundings
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.verification import export as verification
from acip_export.verification.export import EvaluationText
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS


def materialize_bundle(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: ProgressCallback = silent,
    cache: Path | None = None,
) -> Path:
    """Write the bundle of ``plan``, its factors fitted to what the format's quantizer makes of them.

    Raises as :func:`acip_export.materialization.materialize_bundle`, and
        MissingExtraError: the format's quantizer is not installed.
        ImatrixError: see :func:`converters.gguf.imatrix.importance_of`.
    """
    from acip_export import materialization as materialize

    written_as = export_format(plan.format)
    return materialize.materialize_bundle(
        checkpoint,
        rounding_scores(checkpoint.with_options(plan.options), scores),
        plan,
        out,
        force,
        progress,
        written_as.round_trip,
        cache,
        written_as.feedback_types,
    )


def convert_bundle(
    bundle: Path, out: Path, force: bool = False, progress: ProgressCallback = silent, check: bool = True
) -> Plan:
    """Write the export of ``bundle`` into ``out``, whole or not at all, and return its plan.

    Raises:
        BundleError, PlanFileError: the bundle is damaged.
        VerificationError: the files are not byte for byte as large as planned.
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
    """
    claim_output(out, EXPORT_KIND, force, (bundle,))
    opened = Bundle.open(bundle, verify_hash=True)
    output = claim_output(out, EXPORT_KIND, force, (bundle, *opened.plan.options.values()))
    with output.new_directory() as directory:
        _convert(opened, directory, progress, check)
    return opened.plan


def _convert(bundle: Bundle, directory: Path, progress: ProgressCallback, check: bool) -> None:
    export_format(bundle.plan.format).convert(bundle, directory, progress)
    shutil.copyfile(bundle.path / PLAN_FILE, directory / PLAN_FILE)
    failures = verification.check_bytes(directory, bundle.plan) if check else []
    if failures:
        raise VerificationError("the export is not as planned:\n" + "\n".join(f"  {line}" for line in failures))


def export_model(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool = False,
    verify: bool = True,
    text: EvaluationText | None = None,
    tasks: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    sizes: Sequence[Plan] | None = None,
    types: tuple[str, ...] = (),
    progress: ProgressCallback = silent,
    cache: Path | None = None,
) -> Report | None:
    """Materialize, convert and verify ``plan``; the directory ``out`` appears only when all of it went well.

    The bundle is kept beside the export only while it is needed.

    Args:
        text, tasks, timeout: see :func:`acip_export.verification.export.verify_export`.
        sizes: for the slider of ``report.html``, see :func:`planned_sizes`; made from ``types`` if not given.

    Returns:
        The report, also written as ``report.json``, ``report.html`` and ``README.md``; ``None`` without ``verify``.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        VerificationError: bytes or numbers are not what was planned; nothing is left behind.
    """
    read = (scores.file, cache, *tasks, *plan.options.values())
    output = claim_output(out, EXPORT_KIND, force, read, checkpoint.path)
    with scratch_directory(output.place, ".bundle") as scratch, output.new_directory() as directory:
        bundle = scratch / "bundle"
        materialize_bundle(checkpoint, scores, plan, bundle, progress=progress, cache=cache)
        kept = KeptRoundings(scratch / "rounded") if verify else None
        if kept is not None:
            kept.directory.mkdir()
        _convert(Bundle.open(bundle, kept=kept), directory, progress, check=True)
        if not verify:
            return None
        report = verification.verify_export(
            directory,
            bundle,
            text=text,
            dense=checkpoint.path,
            tasks=tasks,
            timeout=timeout,
            progress=progress,
            kept=kept,
            cache=cache,
        )
        verification.require_passed(report)
        save_report(report, directory)
        planned = planned_sizes(checkpoint, scores, plan, types) if sizes is None else sizes
        write_report(directory, checkpoint, scores, sizes=planned)
        return report
