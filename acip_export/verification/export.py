"""Proof that an export is what its plan promised: bytes, then numbers, in the real runtimes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path

from acip_export.artifacts.materialized import MaterializedModel
from acip_export.artifacts.names import PAPERS, PLAN_FILE, TUNED_FILE
from acip_export.artifacts.plan import Plan, load_plan, numbers_sha256
from acip_export.artifacts.report import (
    FileReport,
    Memory,
    MemoryReport,
    Perplexity,
    Provenance,
    Report,
    RuntimeReport,
    TextReport,
)
from acip_export.errors import BundleError, UnsupportedError, VerificationError
from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat, SessionClass
from acip_export.formats.registry import export_format
from acip_export.formats.session import Windows
from acip_export.io.atomic import read_json_object, sha256_of
from acip_export.io.outputs import half_written
from acip_export.machine import processors
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.embedding_similarity import Similarity
from acip_export.model.encoder import Encoder
from acip_export.model.tokenizer_files import lost_normalizer
from acip_export.planning.memory import anonymous_bytes, thread_bytes, uncounted_bytes
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.rounding.quantizer import FEEDBACK_VERSION
from acip_export.units import format_bytes
from acip_export.verification import harness as evaluation
from acip_export.verification.decoders import verify_decoder
from acip_export.verification.encoders import verify_encoder
from acip_export.verification.metrics import finite
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS, ProcessFigures, measure_process
from acip_export.verification.structure import check_structure
from acip_export.verification.tokens import compare_tokens, plain_text_failures, token_notes
from acip_export.verification.unfinished import Unfinished, unfinished
from acip_export.version import made_by

# Thirty times what was measured on trained models in both formats; a tensor in the wrong place costs whole nats.
_ROUNDED_ACTIVATIONS_KL = 0.03

# Whose versions a report names, where they are installed.
_PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-genai",
    "xllamacpp",
    "llama-cpp-python",
    "gguf",
    "lm_eval",
)


@dataclass(frozen=True)
class EvaluationText:
    """Text that quality is measured on.

    Attributes:
        windows: (n, tokens). source: its file name. sha256: of the text.
    """

    windows: Windows
    source: str
    sha256: str


def written_files(export: Path, plan: Plan) -> dict[str, int]:
    """Bytes on disk of the plan's files; a missing one is absent."""
    return {name: (export / name).stat().st_size for name in plan.files if (export / name).is_file()}


def check_bytes(export: Path, plan: Plan) -> list[str]:
    """One sentence per file that is not as planned."""
    written = written_files(export, plan)
    failures = [
        f"{name}: {f'{written[name]:,}' if name in written else 'no'} bytes written, {planned:,} planned"
        for name, planned in plan.files.items()
        if written.get(name) != planned
    ]
    there = (file.relative_to(export) for file in export.rglob("*") if file.is_file())
    # A verification that was killed while it wrote a paper has changed nothing of the export.
    unplanned = {file.as_posix() for file in there if half_written(file) not in PAPERS} - set(plan.files) - PAPERS
    return failures + [f"{name}: written, but not planned" for name in sorted(unplanned)]


class OverBudget(Exception):  # noqa: N818 - an answer, which the caller acts on
    """A process took ``nbytes`` more than its plan's budget."""

    def __init__(self, runtime: str, nbytes: int) -> None:
        super().__init__(f"{runtime} took {nbytes:,} bytes more than the budget")
        self.runtime, self.nbytes = runtime, nbytes


def verify_export(
    export: Path,
    model: MaterializedModel,
    text: EvaluationText | None = None,
    dense: Path | None = None,
    tasks: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    progress: ProgressCallback = silent,
    cache: Path | None = None,
    stop_over_budget: bool = False,
) -> Report:
    """Check the files, run the export in every runtime of its format, and compare with the bundle and the dense model.

    Runtimes run in fresh processes, which are measured, and which alone die if a runtime crashes. Language models that
    exports are compared with are passed block by block: at most two blocks of one are in memory, or its head in slices,
    and the logits of one window.

    Args:
        model: the bundle, from its directory or made as it is needed.
        text: to measure quality on. dense: the base model's directory, for perplexity and divergence on that text, and
            for the similarities that an encoder keeps.
        tasks: of lm-evaluation-harness, run on the bundle.
        timeout: seconds for each answer of the fresh processes.
        cache: directory that keeps the dense model's hidden states on ``text``, for other exports.
        stop_over_budget: end as soon as it is known that memory is above the budget, with the most of all runtimes.

    Raises:
        OverBudget: see ``stop_over_budget``.
        PlanFileError, BundleError: the export has no readable plan, or one of another plan than ``model``'s.
        RuntimeCrashError, RuntimeHangError: a runtime died or did not answer; VerificationError: it refuses the export.
        MissingExtraError: a runtime, or lm-evaluation-harness for ``tasks``, is not installed.
    """
    if tasks:
        evaluation.require(tasks)
    plan = load_plan(export / PLAN_FILE)
    _check_same_plan(export, plan, model)
    written_as = export_format(plan.format)
    failures = check_bytes(export, plan)
    encoder = model.as_checkpoint().encoder
    structure, differences = (None, []) if failures else check_structure(written_as, export, model)
    failures += differences
    found, task_figures = _Found(), None

    @functools.cache
    def hashes() -> Mapping[str, str]:
        return {name: sha256_of(export / name) for name in written_files(export, plan)}

    if not failures:
        with unfinished(export, _origin(export, model)) as kept:
            if encoder is not None:
                found = _run_encoder(
                    written_as, export, model, encoder, text, dense, timeout, progress, kept, hashes, stop_over_budget
                )
            else:
                found = _run(
                    written_as, export, model, text, dense, timeout, progress, cache, kept, hashes, stop_over_budget
                )
            failures += found.failures
            if tasks and not failures:
                task_figures = evaluation.run_tasks(model, tasks, progress, kept)
    similarity = found.similarity
    return Report(
        export=export.name,
        model=plan.model,
        format=plan.format,
        layout=plan.layout,
        task=plan.task,
        budget_bytes=plan.budget_bytes,
        budget_scope=plan.budget_scope,
        planned_bytes=plan.planned_bytes,
        written_bytes=sum(written_files(export, plan).values()),
        memory_bytes=plan.memory_bytes,
        process_bytes=plan.process_bytes,
        breakdown=plan.breakdown,
        predicted_loss=plan.predicted_loss,
        predicted_divergence=plan.predicted_divergence,
        predicted_perplexity=plan.predicted_perplexity,
        passed=not failures,
        failures=tuple(failures),
        notes=(*model.notes, *found.notes),
        files=_files(export, plan, hashes()),
        structure=structure,
        provenance=Provenance(
            made_by(),
            plan.model_fingerprint,
            plan.scores_sha256,
        ),
        machine={"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        versions=_versions(),
        text=None if text is None else _text_report(text),
        runtimes=found.runtimes,
        bundle_perplexity=found.bundle_perplexity,
        dense_perplexity=found.dense_perplexity,
        similarity=None if similarity is None else _finite(1 - similarity.mean_distance),
        similarity_spearman=None if similarity is None else _finite(similarity.spearman),
        similarity_error=None if similarity is None else _finite(similarity.mean_error),
        tasks=task_figures,
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


@dataclass(frozen=True)
class _Found:
    """What running an export gave."""

    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    runtimes: tuple[RuntimeReport, ...] = ()
    bundle_perplexity: Perplexity | None = None
    dense_perplexity: Perplexity | None = None
    similarity: Similarity | None = None


def _run(
    written_as: ExportFormat,
    export: Path,
    model: MaterializedModel,
    text: EvaluationText | None,
    dense: Path | None,
    timeout: float,
    progress: ProgressCallback,
    cache: Path | None,
    kept: Unfinished,
    hashes: Callable[[], Mapping[str, str]],
    stop_over_budget: bool,
) -> _Found:
    plan = model.plan
    windows = None if text is None else text.windows

    def measured(figures: Sequence[ProcessFigures]) -> None:
        if stop_over_budget:
            _stop_over_budget(written_as, model, figures)

    found = verify_decoder(export, model, written_as, windows, dense, timeout, progress, cache, kept, hashes, measured)
    reports: list[RuntimeReport] = []
    for session, each in zip(written_as.sessions, found.runtimes, strict=True):
        checkpoint = model.as_checkpoint()
        quality = None if reports else found.quality
        reports.append(
            RuntimeReport(
                each.process.runtime,
                each.process.load_seconds,
                finite(each.agreement),
                None if quality is None else finite(quality.export),
                None if quality is None else finite(quality.divergence),
                _memory_report(written_as, plan, checkpoint, session, each.process.memory),
                each.process.speed,
                compare_tokens(each.process.tokens, model.path),
            )
        )
    failures = list[str]()
    tokenizer = model.path / "tokenizer.json"
    # The plan says what a runtime leaves out on purpose.
    normalized = tokenizer.is_file() and lost_normalizer(read_json_object(tokenizer, model.ERROR)) is not None
    for report in reports:
        failures += _check_agreement(written_as, plan, report) + _check_memory(plan, report)
        failures += [] if normalized else plain_text_failures(report.runtime, report.tokens)
    odd = [note for report in reports for note in token_notes(report.runtime, report.tokens)]
    quality = found.quality
    return _Found(
        tuple(failures),
        (*_notes(reports[0].memory, text, dense), *odd),
        tuple(reports),
        None if quality is None else finite(quality.bundle),
        None if quality is None else finite(quality.dense),
    )


def _notes(memory: Memory | None, text: EvaluationText | None, dense: Path | None) -> tuple[str, ...]:
    """What could not be measured."""
    notes = []
    if memory is None:
        notes.append(f"memory was not measured: {platform.system()} has no /proc")
    if text is not None and dense is None:
        notes.append("the dense model is not here: nothing was compared with it")
    return tuple(notes)


def _run_encoder(
    written_as: ExportFormat,
    export: Path,
    model: MaterializedModel,
    encoder: Encoder,
    text: EvaluationText | None,
    dense: Path | None,
    timeout: float,
    progress: ProgressCallback,
    kept: Unfinished,
    hashes: Callable[[], Mapping[str, str]],
    stop_over_budget: bool,
) -> _Found:
    plan, session_class = model.plan, written_as.encoder_session
    if session_class is None:
        raise UnsupportedError(
            f"no runtime opens encoders in {written_as.name}; export without verifying:  --no-verify"
        )
    progress(Progress("verify", 0, item=f"{session_class.runtime}, in a process of its own"))
    measured = measure_process(session_class.module, session_class.name, export, timeout)
    if stop_over_budget:
        _stop_over_budget(written_as, model, [measured])
    progress(Progress("verify", 0, item=session_class.runtime))
    windows = None if text is None else text.windows
    figures = verify_encoder(export, model, encoder, written_as, session_class, dense, windows, kept, hashes())
    memory = _memory_report(written_as, plan, model.as_checkpoint(), session_class, measured.memory)
    report = RuntimeReport(
        figures.runtime, measured.load_seconds, figures.agreement, None, None, memory, measured.speed
    )
    failures = (*figures.failures, *_check_memory(plan, report))
    return _Found(failures, _notes(report.memory, text, dense), (report,), similarity=figures.similarity)


def _memory_report(
    written_as: ExportFormat, plan: Plan, checkpoint: Checkpoint, session: SessionClass, memory: Memory | None
) -> MemoryReport | None:
    if memory is None:
        return None
    beside = _beside_plan(written_as, plan, checkpoint, session)
    beyond = _beyond(plan, memory, beside)
    anonymous = anonymous_bytes(written_as, plan, checkpoint, session.runtime)
    return MemoryReport(
        **dataclasses.asdict(memory),
        predicted_bytes=plan.memory_bytes + beside.predicted + beside.threads,
        predicted_anonymous_bytes=anonymous + beside.threads,
        within_budget=None if beyond is None else beyond <= 0,
    )


@dataclass(frozen=True)
class _BesidePlan:
    """Bytes of a runtime's process that a plan does not count.

    Attributes:
        predicted: the runtime's own; less what plans count and this runtime has not. excused: the same, never less than
            the runtime's own: what it has not is within the budget of the plan. threads: what is of this machine.
    """

    predicted: int
    excused: int
    threads: int


def _beside_plan(written_as: ExportFormat, plan: Plan, checkpoint: Checkpoint, session: SessionClass) -> _BesidePlan:
    predicted = uncounted_bytes(written_as, plan, checkpoint, session.runtime)
    own = written_as.memory.process(checkpoint, session.runtime).total
    threads = thread_bytes(written_as, plan, checkpoint, processors(not session.own_threads))
    return _BesidePlan(predicted, max(predicted, own), threads)


def _beyond(plan: Plan, memory: Memory, beside: _BesidePlan) -> int | None:
    """Bytes that a process took above the budget, of those that its scope covers.

    ``None``: what a process on this machine takes says nothing about the budget.
    """
    if plan.budget_scope == "file" or plan.serving.backend != DEFAULT_BACKEND:
        return None
    if plan.budget_scope == "anonymous":
        return memory.allocated_bytes - beside.threads - plan.budget_bytes
    excused = beside.excused if plan.budget_scope == "memory" else 0
    return memory.peak_bytes - beside.threads - excused - plan.budget_bytes


def _stop_over_budget(written_as: ExportFormat, model: MaterializedModel, measured: Sequence[ProcessFigures]) -> None:
    """Raises OverBudget, of the runtime that took the most beyond it."""
    plan, checkpoint = model.plan, model.as_checkpoint()
    sessions = written_as.sessions if plan.task == "causal" else (written_as.encoder_session,)
    most, of_most = 0, ""
    for session, figures in zip(sessions, measured, strict=True):
        if session is None or figures.memory is None:
            continue
        beside = _beside_plan(written_as, plan, checkpoint, session)
        beyond = _beyond(plan, figures.memory, beside)
        if beyond is not None and beyond > most:
            most, of_most = beyond, figures.runtime
    if most:
        raise OverBudget(of_most, most)


def _check_same_plan(export: Path, plan: Plan, model: MaterializedModel) -> None:
    if plan != model.plan:
        raise BundleError(f"{model.path} is the bundle of another plan than {export / PLAN_FILE}")


def _origin(export: Path, model: MaterializedModel) -> str:
    """All that measurements of a model follow from, its texts aside."""
    tuned = export / TUNED_FILE
    return "\n".join(
        [
            made_by(f"feedback {FEEDBACK_VERSION}", str(_versions())),
            f"plan {numbers_sha256(model.plan)} {model.made_of}",
            f"tuned {sha256_of(tuned) if tuned.is_file() else None}",
        ]
    )


def _files(export: Path, plan: Plan, hashes: Mapping[str, str]) -> tuple[FileReport, ...]:
    written = written_files(export, plan)
    return tuple(FileReport(name, written.get(name), planned, hashes.get(name)) for name, planned in plan.files.items())


def _text_report(text: EvaluationText) -> TextReport:
    count, tokens = text.windows.shape
    return TextReport(text.source, text.sha256, count, tokens, text.windows.size)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _check_agreement(written_as: ExportFormat, plan: Plan, report: RuntimeReport) -> list[str]:
    """Float exports must equal the bundle; rounded ones must not be further off than rounding can take them."""
    agreement = report.agreement
    if agreement is None:
        return [f"{report.runtime}: its logits are no finite numbers"]
    failures = []
    if written_as.is_exact(plan):
        tolerance = written_as.float_tolerance
        rounded_cache = written_as.float_kl is not None and agreement.mean_kl <= written_as.float_kl
        if not (agreement.max_logit_difference <= tolerance or rounded_cache):
            failures.append(
                f"{report.runtime}: logits differ by {agreement.max_logit_difference:.2e}, at most {tolerance} allowed"
            )
        if agreement.greedy_equal != agreement.greedy_tokens:
            failures.append(f"{report.runtime}: greedy tokens differ after {agreement.greedy_equal}")
    else:
        # The bundle is rounded alike, so what is left is the runtime's rounding of activations to eight bits.
        if not agreement.mean_kl <= _ROUNDED_ACTIVATIONS_KL:
            failures.append(
                f"{report.runtime}: KL from the bundle is {agreement.mean_kl:.3f} nats per token, at most "
                f"{_ROUNDED_ACTIVATIONS_KL}"
            )
    return failures


def _check_memory(plan: Plan, report: RuntimeReport) -> list[str]:
    memory = report.memory
    if memory is None or memory.within_budget is not False:
        return []
    took, planned, what = memory.peak_bytes, memory.predicted_bytes, "bytes"
    if plan.budget_scope == "anonymous":
        took, planned = memory.allocated_bytes, memory.predicted_anonymous_bytes
        what = "bytes that the system cannot drop"
    return [
        f"{report.runtime}: its process took {took:,} {what}, {planned:,} were planned; "
        f"the budget of {format_bytes(plan.budget_bytes)} ({plan.budget_scope}) does not hold"
    ]


def require_passed(report: Report) -> None:
    """Raises VerificationError with every failure."""
    if not report.passed:
        lines = "\n".join(f"  {failure}" for failure in report.failures)
        raise VerificationError(f"{report.export} is not what was planned:\n{lines}")
