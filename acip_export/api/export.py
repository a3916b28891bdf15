"""From a plan to the files that a runtime opens."""

from __future__ import annotations

import hashlib
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.api.plan import planned_sizes
from acip_export.api.rank import rounding_scores
from acip_export.api.report import write_report
from acip_export.api.tuning import check_tuning, tuned_numbers
from acip_export.artifacts.bundle import BUNDLE_KIND, Bundle, bundle_beside
from acip_export.artifacts.export_directory import EXPORT_KIND, is_unverified, mark_unverified, settle_mark
from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.names import MANIFEST_FILE, PLAN_FILE, REPORT_FILE, SCORE_FILE_SUFFIX, TUNED_FILE
from acip_export.artifacts.plan import Plan, dumps_plan, numbers_sha256
from acip_export.artifacts.report import Report, load_report, save_report
from acip_export.artifacts.scores import ScoreFile
from acip_export.artifacts.tuned import Tuned, save_tuned
from acip_export.errors import (
    AcipError,
    BundleError,
    InfeasibleBudgetError,
    InputError,
    PlanFileError,
    UsageError,
    VerificationError,
)
from acip_export.formats.registry import export_format
from acip_export.io.atomic import sha256_of
from acip_export.io.locks import held
from acip_export.io.outputs import Output, claim_output
from acip_export.io.scratch import Scratch
from acip_export.io.stamps import stamp_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.rounding.kept_roundings import KeptRoundings, are_beside, roundings_beside
from acip_export.rounding.quantizer import origin_of
from acip_export.units import format_bytes
from acip_export.verification import export as verification
from acip_export.verification.export import EvaluationText
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS

if TYPE_CHECKING:
    from acip_export.materialization import PlannedModel

logger = logging.getLogger(__name__)

_PLANS_AGAIN = 2
# Two processes with the same export differ by as much as the larger of a megabyte and a two hundredth of the budget; on
# a busy machine by more.
_PROCESSES_DIFFER_BYTES, _PROCESSES_DIFFER_SHARE = 1_000_000, 200
# Where an export waits that is to replace a verified one.
_UNVERIFIED = "-unverified"


def materialize_bundle(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: ProgressCallback = silent,
    cache: Path | None = None,
    kept: KeptRoundings | None = None,
) -> Path:
    """Write the bundle of ``plan``, its factors fitted to what the format's quantizer makes of them.

    Args:
        cache, kept: as :func:`acip_export.materialization.materialize_bundle`.

    Raises as :func:`acip_export.materialization.materialize_bundle`, and
        UsageError: the plan is tuned.
        MissingExtraError: the format's quantizer is not installed.
        ImatrixError: see :func:`converters.gguf.imatrix.importance_of`.
    """
    from acip_export import materialization as materialize

    if plan.tune_seconds is not None:
        raise UsageError(
            "a bundle has the ranking's numbers before they are rounded, and tuning makes others; export without a "
            "bundle, or plan without  --tune"
        )

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
        written_as.quantizer(),
        kept,
    )


def planned_model(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    scratch: Scratch | None,
    cache: Path | None = None,
    kept: KeptRoundings | None = None,
    tuned: Tuned | None = None,
) -> PlannedModel:
    """Open what :func:`materialize_bundle` would write, to be made tensor by tensor; raises as that does.

    Args:
        scratch, cache, kept, tuned: as :class:`acip_export.materialization.PlannedModel`.
    """
    from acip_export.materialization import PlannedModel

    written_as = export_format(plan.format)
    return PlannedModel(
        checkpoint,
        rounding_scores(checkpoint.with_options(plan.options), scores),
        plan,
        written_as.round_trip,
        cache,
        written_as.feedback_types,
        scratch,
        kept,
        tuned,
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


def _convert(model: MaterializedModel, directory: Path, progress: ProgressCallback, check: bool) -> None:
    plan = model.plan
    export_format(plan.format).convert(model, directory, progress)
    (directory / PLAN_FILE).write_text(dumps_plan(plan), encoding="utf-8")
    failures = verification.check_bytes(directory, plan) if check else []
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
    progress: ProgressCallback = silent,
    cache: Path | None = None,
    plan_again: Callable[[int], Plan] | None = None,
    roundings: KeptRoundings | None = None,
    keep_bundle: bool = False,
) -> Report | None:
    """Convert and verify ``plan``, its tensors made from checkpoint and scores as they are needed.

    The directory ``out`` appears when the export is converted, whole, and is marked as unverified until it has passed.
    One that is there already is replaced only by one that has passed: until then, the new one is ``out-unverified``.

    Args:
        text, tasks, timeout: see :func:`acip_export.verification.export.verify_export`.
        sizes: for the slider of ``report.html``, see :func:`planned_sizes`; made if not given.
        plan_again: makes a plan for a budget of so many bytes. What a process takes beyond the plan's budget is taken
            off, twice at most, before verification fails.
        roundings: keeps rounded matrices for other sizes.
        keep_bundle: write the bundle too, beside the export, and everything from that.

    Returns:
        The report, also written as ``report.json``, ``report.html`` and ``README.md``; ``None`` without ``verify``.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        VerificationError: bytes are not what was planned: nothing is left behind. Or numbers are not: the export stays,
            marked, with its report.
    """
    read = (scores.file, cache, *tasks, *plan.options.values())
    output = claim_output(out, EXPORT_KIND, force, read, checkpoint.path)
    bundle = bundle_beside(out) if keep_bundle else None
    if bundle is not None:
        claim_output(bundle, BUNDLE_KIND, force, read, checkpoint.path)

    if bundle is None:
        check_tuning(checkpoint, scores, plan)

    def converted(plan: Plan, directory: Path, force: bool, kept: KeptRoundings) -> MaterializedModel:
        if bundle is None:
            tuned = tuned_numbers(checkpoint, scores, plan, cache, kept, progress)
            model: MaterializedModel = planned_model(checkpoint, scores, plan, None, cache, kept, tuned)
            if tuned is not None:
                save_tuned(tuned, plan, directory / TUNED_FILE)
        else:
            model = _bundle(checkpoint, scores, plan, bundle, force, progress, cache, kept)
        _convert(model, directory, progress, check=True)
        checkpoint.check_unchanged()
        return model

    if not verify:
        with (
            output.held(),
            _roundings(roundings, output.place, plan, scores) as kept,
            output.new_directory() as directory,
        ):
            converted(plan, directory, force, kept)
        return None
    waiting = output
    if output.place.is_dir() and any(output.place.iterdir()) and not is_unverified(output.place):
        waiting = claim_output(out.with_name(out.name + _UNVERIFIED), EXPORT_KIND, True, read, checkpoint.path)
    command = _verify_command(waiting.named, checkpoint, scores)
    budgets = [plan.budget_bytes]
    while True:
        last = plan_again is None or len(budgets) > _PLANS_AGAIN
        try:
            with (
                output.held(),
                _roundings(roundings, output.place, plan, scores) as kept,
                _staying(waiting, plan, command),
            ):
                with waiting.new_directory() as directory:
                    model = converted(plan, directory, force or len(budgets) > 1, kept)
                    mark_unverified(directory, f"Verify it with:  {command}")
                report = verification.verify_export(
                    waiting.place,
                    model,
                    text=text,
                    dense=checkpoint.path,
                    tasks=tasks,
                    timeout=timeout,
                    progress=progress,
                    cache=cache,
                    stop_over_budget=not last,
                )
                planned = planned_sizes(checkpoint, scores, plan) if sizes is None else sizes
                return _settled(report, waiting, output, checkpoint, scores, planned)
        except verification.OverBudget as over:
            assert plan_again is not None
            apart = max(_PROCESSES_DIFFER_BYTES, plan.budget_bytes // _PROCESSES_DIFFER_SHARE)
            budgets.append(budgets[-1] - over.nbytes - len(budgets) * apart)
            logger.warning(
                "%s took %s bytes more than the budget of %s: planned again, for %s",
                over.runtime,
                f"{over.nbytes:,}",
                format_bytes(plan.budget_bytes),
                format_bytes(budgets[-1]),
            )
            plan = _planned_again(plan, budgets[-1], over, plan_again, waiting.named, command)
            waiting = replace(waiting, force=True)


def _bundle(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool,
    progress: ProgressCallback,
    cache: Path | None,
    kept: KeptRoundings,
) -> Bundle:
    """Write the bundle of an export, unless a run that was killed behind it has."""
    what, manifest, begin = f"bundle {numbers_sha256(plan)}", out / MANIFEST_FILE, time.monotonic()
    if manifest.is_file() and kept.finished(what) == sha256_of(manifest):
        try:
            return Bundle.open(out, verify_hash=True, kept=kept)
        except (BundleError, PlanFileError) as reason:
            logger.warning("%s; it is written again", reason)
    materialize_bundle(checkpoint, scores, plan, out, force, progress, cache, kept)
    kept.finish(what, sha256_of(manifest), time.monotonic() - begin)
    return Bundle.open(out, kept=kept)


@contextmanager
def _roundings(shared: KeptRoundings | None, place: Path, plan: Plan, scores: ScoreFile) -> Iterator[KeptRoundings]:
    """Yield rounded matrices: the ``shared`` ones, or what an earlier run of the same export has left."""
    if shared is None:
        quantizer = export_format(plan.format, plan.serving.backend).quantizer()
        with roundings_beside(place, origin_of([quantizer], scores.sha256, numbers_sha256(plan))) as kept:
            yield kept
        return
    yield shared
    shared.parts(numbers_sha256(plan)).close()


def roundings_left(export: Path, plan: Plan, scores: ScoreFile) -> AbstractContextManager[KeptRoundings | None]:
    """Return what an interrupted run has left of an export that is there, gone when the block ends."""
    place = export.with_name(export.name.removesuffix(_UNVERIFIED))
    return _roundings(None, place, plan, scores) if are_beside(place) else nullcontext(None)


def _planned_again(
    plan: Plan,
    nbytes: int,
    over: verification.OverBudget,
    plan_again: Callable[[int], Plan],
    export: Path,
    command: str,
) -> Plan:
    """Return a plan for ``nbytes``, whose budget is still what was asked for.

    Raises:
        VerificationError: there is none; ``export`` stays.
    """
    try:
        smaller = plan_again(nbytes)
    except InfeasibleBudgetError as reason:
        needed = math.ceil((plan.budget_bytes + over.nbytes) / 1e6)
        raise VerificationError(
            f"{over.runtime} took {over.nbytes:,} bytes more than the budget of {plan.budget_bytes:,}, and no plan "
            f"takes so much less: the smallest is of {reason.smallest_feasible_bytes:,}.\n"
            f"{_stays(export, plan, command)}\nGive it  --budget {needed}MB"
        ) from over
    note = f"planned for {nbytes:,} bytes: {over.runtime} took {over.nbytes:,} more than the budget before"
    return replace(smaller, budget_bytes=plan.budget_bytes, notes=(*smaller.notes, note))


@contextmanager
def _staying(output: Output, plan: Plan, command: str) -> Iterator[None]:
    """Say, where verification does not come to its end, that the export is still there, and what to type."""
    before = _identity(output.place)
    try:
        yield
    except verification.OverBudget:
        raise
    except BaseException as error:
        # The signal that ends this may come right behind the renaming that makes the export appear.
        if _identity(output.place) == before:
            raise
        if isinstance(error, AcipError):
            error.args = (f"{error}\n{_stays(output.named, plan, command)}",)
        else:
            logger.warning("%s", _stays(output.named, plan, command))
        raise


def _identity(directory: Path) -> int | None:
    try:
        return directory.stat().st_ino
    except OSError:
        return None


def _stays(export: Path, plan: Plan, command: str) -> str:
    written = sum(verification.written_files(export, plan).values())
    return (
        f"The export stays in {export}, marked as unverified: {plan.planned_bytes:,} bytes planned, {written:,} "
        f"written.\nVerify it with:  {command}"
    )


def _verify_command(export: Path, checkpoint: Checkpoint, scores: ScoreFile) -> str:
    """What verifies an export, typed where this command was."""
    words = ["acip-export", "verify", str(export)]
    if not checkpoint.path.samefile(Path.cwd()):
        words += ["--model", str(checkpoint.path)]
    if scores.file is not None and list(checkpoint.path.glob(f"*{SCORE_FILE_SUFFIX}")) != [scores.file]:
        words += ["--scores", str(scores.file)]
    return shlex.join(words)


def export_once(
    kept: KeptRoundings | None, out: Path, plan: Plan, asked: Sequence[object], export: Callable[[], Report | None]
) -> Report | None:
    """Export one of several sizes, unless an earlier run of the same call has finished it, and nobody changed it since.

    Args:
        kept: of all sizes; ``None``: there is one. asked: of the export, beside its plan. export: makes it.

    Returns:
        What ``export`` does, or did.
    """
    if kept is None:
        return export()
    what = f"export {out.resolve()} {numbers_sha256(plan)} {asked}"
    noted, begin = kept.finished(what), time.monotonic()
    if noted and noted == _stamps(out) and not is_unverified(out):
        # A power cut leaves names and sizes.
        try:
            report = load_report(out / REPORT_FILE) if (out / REPORT_FILE).is_file() else None
            if report is None or all(each.sha256 == sha256_of(out / each.name) for each in report.files):
                logger.warning("%s was finished by an earlier run, and stays as it is", out)
                return report
        except InputError as reason:
            logger.warning("%s; the export is made again", reason)
    report = export()
    kept.finish(what, _stamps(out), time.monotonic() - begin)
    return report


def _stamps(export: Path) -> str:
    """Return what tells, without reading them, whether files of an export or of its bundle have changed."""
    files = (file for place in (export, bundle_beside(export)) for file in sorted(place.rglob("*")))
    found = [(str(file), stamp_of(file)) for file in files]
    return hashlib.sha256(str(found).encode()).hexdigest()


@contextmanager
def shared_work(
    place: Path | None, formats: Sequence[str], scores: ScoreFile, cache: Path | None
) -> Iterator[tuple[Path | None, KeptRoundings | None]]:
    """Yield the cache and the rounded matrices that exports of several sizes share; those of a killed run are gone on
    with.

    Args:
        place: directory that the exports are written into; ``None``: there is one export, and nothing to share.
        formats: of the exports.
        cache: the user's, if there is one, which stays.
    """
    if place is None:
        yield cache, None
        return
    shared = place / "shared"
    quantizers = [export_format(name).quantizer() for name in sorted(set(formats))]
    with held(shared), roundings_beside(shared, origin_of(quantizers, scores.sha256)) as kept:
        yield cache or kept.directory / "cache", kept


def _settled(
    report: Report,
    waiting: Output,
    output: Output,
    checkpoint: Checkpoint,
    scores: ScoreFile,
    sizes: Sequence[Plan],
) -> Report:
    """Write what was found into the export, and put it into its place if it has passed.

    Raises:
        VerificationError: it has not.
    """
    place = waiting.place
    if report.passed:
        report = replace(report, export=output.place.name)
    save_report(report, place)
    if report.passed and place != output.place:
        output.take(place)
        place = output.place
    write_report(place, checkpoint, scores, sizes=sizes)
    settle_mark(place, report.failures)
    verification.require_passed(report)
    return report
