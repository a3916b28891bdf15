"""The chain of stages. What the command line does, as plain functions."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from acip_export.bundle import PLAN_FILE, Bundle
from acip_export.checkpoint import Checkpoint
from acip_export.errors import (
    AcipError,
    CheckpointError,
    InfeasibleBudgetError,
    MissingExtraError,
    ScoreFileError,
    UnsupportedError,
    VerificationError,
)
from acip_export.files import new_directory, refuse_existing, scratch_directory
from acip_export.plan import PlanRequest, Problem, SweepLine, make_plan, preset_points, sweep
from acip_export.plans import Plan, load_plan
from acip_export.report import Exported, Ranking, build_page, write_papers
from acip_export.report.data import ScoreMap, embedded, read_export
from acip_export.report.source import hub_id, license_of
from acip_export.report.write import PAGE_FILE
from acip_export.rounding_errors import (
    RoundingErrors,
    cache_file,
    load_rounding_errors,
    pair_key,
    residual_key,
    save_rounding_errors,
)
from acip_export.scores import ScoreFile, find_scores, load_scores
from acip_export.verify import verify as verification
from acip_export.verify.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.verify.runtime import Windows
from acip_export.verify.verify import EvaluationText, Report

if TYPE_CHECKING:
    from acip_export.rank import Algorithm

logger = logging.getLogger(__name__)

# The last target and the last scores that are in no file, and what was measured for them: every budget asks again.
_measured_last: tuple[ScoreFile, RoundingErrors] | None = None


_LONGEST_WINDOW = 1024


@dataclass(frozen=True)
class StageProgress:
    """``done`` of ``total`` units of a stage (``None``: not known beforehand); ``item`` is what was finished last."""

    stage: str
    done: int
    total: int | None
    item: str


ProgressCallback = Callable[[StageProgress], None]


def quiet(_: StageProgress) -> None:
    """The callback that draws nothing."""


def rank_to_file(
    checkpoint: Checkpoint,
    data: str | Path,
    out: Path,
    algorithm: Algorithm = "acip",
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> ScoreFile:
    """Rank ``checkpoint`` and write the score file; ``settings`` replace those that suit the model.

    Takes the other ``options`` of, and raises as, :func:`acip_export.rank.rank_model`.
    """
    from acip_export.rank import automatic_config, rank_model

    acip = replace(automatic_config(checkpoint), **settings) if algorithm == "acip" else None
    return rank_model(checkpoint.path, data, algorithm=algorithm, acip=acip, out=out, **options)


def ranking_summary(scores: ScoreFile) -> dict[str, Any]:
    """What a score file says about itself, ready for JSON."""
    return {
        "model": dict(scores.model),
        "algorithm": dict(scores.algorithm),
        "data": dict(scores.data),
        "curve": [asdict(point) for point in scores.curve],
    }


def open_scores(checkpoint: Checkpoint, scores: Path | None) -> ScoreFile:
    """The score file given, or the only one beside the model."""
    return load_scores(scores or find_scores(checkpoint.path))


def rounding_errors(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, progress: ProgressCallback = quiet
) -> RoundingErrors:
    """What the target's quantizer costs on this model, for everything that ``request`` may choose.

    Read from the cache beside the score file; what it lacks is measured once and added to it. Without the quantizer
    the answer is what the cache has.
    """
    global _measured_last
    from acip_export.plan.candidates import choose_embedding_types, pair_types, residual_bases
    from acip_export.targets import target as find_target
    from converters.registry import converter

    scores.check_model(checkpoint)
    target = find_target(request.target, request.execution)
    types, layout = target.choose_types(request.types), target.layout(request.layout)
    quantizer = converter(target.name).quantizer()
    cache = None if scores.file is None else cache_file(scores.file, target.name)
    known = RoundingErrors(target.name, quantizer, scores.sha256)
    if cache is not None:
        known = load_rounding_errors(cache, target.name, quantizer, scores.sha256)
    elif _measured_last is not None and _measured_last[0] is scores and _measured_last[1].target == target.name:
        known = _measured_last[1]
    embedding_types = choose_embedding_types(target, types)
    dense = {
        name: tuple(
            f.name
            for f in (embedding_types if name in scores.embedding_sensitivity else types)
            if f.fits(info.shape[1]) and not (f.needs_importance and name in scores.embedding_sensitivity)
        )
        for name, info in checkpoint.tensors.items()
        if name in scores.embedding_sensitivity or name.removesuffix(".weight") in scores.modules
    }
    pairs = () if layout.low_rank is None else pair_types(types)
    bases = residual_bases(layout, types)
    keys = [*(pair_key(*pair) for pair in pairs), *map(residual_key, bases)]
    if known.covers(dense, keys, scores.modules):
        return known

    from acip_export.materialize.rounding_errors import measure_rounding

    try:
        measured = measure_rounding(
            checkpoint,
            scores,
            known,
            dense,
            pairs,
            bases,
            layout.residual_pairs,
            converter(target.name).round_trip,
            lambda p: progress(StageProgress("measure rounding", p.done, p.total, p.item)),
        )
    except MissingExtraError as missing:
        logger.warning("rounding errors are those of Gaussian weights: %s", missing)
        return known
    if cache is not None:
        save_rounding_errors(measured, cache)
    else:
        _measured_last = (scores, measured)
    return measured


def planning_problem(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, progress: ProgressCallback = quiet
) -> Problem:
    """What all budgets of ``request``'s target, layout and types share: measured rounding errors, exact file sizes.

    Raises as :func:`acip_export.plan.make_plan`, but for the budget.
    """
    from acip_export.targets import target as find_target
    from converters.registry import converter

    target = converter(request.target)
    layout = find_target(request.target, request.execution).layouts_for(request.layout, request.runtime)[0].name
    request = replace(request, layout=layout)
    checkpoint = checkpoint.with_options(request.options)
    return Problem.of(
        checkpoint,
        scores,
        request,
        lambda tensors, runtime: target.predict_files(checkpoint, layout, tensors, runtime),
        rounding_errors(checkpoint, scores, request, progress),
    )


def measure_rounding_errors(checkpoint: Checkpoint, scores: Path, progress: ProgressCallback = quiet) -> None:
    """Fill the caches beside a score file for the default layout and types of every target whose quantizer is here.

    Plans measure what is missing themselves; having it from the start makes the first one take seconds.
    """
    from acip_export.targets import TARGETS

    opened = load_scores(scores)
    for name in TARGETS:
        try:
            rounding_errors(checkpoint, opened, PlanRequest(name, 1), progress)
        except (MissingExtraError, UnsupportedError) as reason:
            logger.info("rounding errors of %s are not measured: %s", name, reason)


def plan_export(
    checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest, progress: ProgressCallback = quiet
) -> Plan:
    """Plan with measured rounding errors and the exact file sizes of the target's converter; with the layout ``auto``,
    the best predicted of all.

    Raises as :func:`acip_export.plan.make_plan`; with ``auto`` only if no layout has a plan.
    """
    from acip_export.targets import target as find_target
    from converters.registry import converter

    known = find_target(request.target, request.execution)
    known.check_options(request.options)
    layouts = known.layouts_for(request.layout, request.runtime)
    target = converter(request.target)
    checkpoint = checkpoint.with_options(request.options)
    _rounding_scores(checkpoint, scores)  # an unfit imatrix is refused before anything is computed

    def plan(layout: str) -> Plan:
        return make_plan(
            checkpoint,
            scores,
            replace(request, layout=layout),
            lambda tensors, runtime: target.predict_files(checkpoint, layout, tensors, runtime),
            rounding_errors(checkpoint, scores, replace(request, layout=layout), progress),
        )

    if len(layouts) == 1:
        return plan(layouts[0].name)
    plans: list[Plan] = []
    refusals: list[InfeasibleBudgetError] = []
    unsupported: list[UnsupportedError] = []
    for layout in layouts:
        try:
            plans.append(plan(layout.name))
        except InfeasibleBudgetError as error:
            refusals.append(error)
        except UnsupportedError as error:
            unsupported.append(error)
    if not plans:
        if refusals:
            raise min(refusals, key=lambda error: error.smallest_feasible_bytes)
        raise unsupported[0]
    best = min(plans, key=lambda made: made.predicted_loss)
    compared = ", ".join(f"{made.layout} {made.predicted_loss:.4f}" for made in plans)
    return replace(best, notes=(*best.notes, f"predicted loss by layout: {compared} {best.loss_unit}"))


def sweep_sizes(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    requests: Sequence[tuple[str, PlanRequest]],
    progress: ProgressCallback = quiet,
) -> list[SweepLine]:
    """The curve of sizes against predicted quality for every labelled request; the first of a target has its presets.

    Requests that the model or the installation does not support are left out, unless none is supported.

    Raises:
        UnsupportedError, MissingExtraError: of the first request, when no line could be made.
    """
    lines: list[SweepLine] = []
    refusals: list[AcipError] = []
    for label, request in requests:
        try:
            problem = planning_problem(checkpoint, scores, request, progress)
            line = sweep(problem, request, label, progress=_steps_of(label, progress))
        except (UnsupportedError, MissingExtraError) as error:
            refusals.append(error)
            continue
        first = all(line.target != other.target for other in lines)
        lines.append(replace(line, presets=preset_points(problem, request)) if first else line)
    if not lines:
        raise refusals[0]
    return lines


def _steps_of(stage: str, progress: ProgressCallback) -> Callable[[int, int], None]:
    return lambda done, total: progress(StageProgress(stage, done, total, ""))


def sweep_document(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    requests: Sequence[tuple[str, PlanRequest]],
    lines: Sequence[SweepLine],
) -> dict[str, Any]:
    """What a sweep is written as; docs/plan.md describes it."""
    request = requests[0][1]
    return {
        "format": "acip-sweep",
        "version": 1,
        "model": checkpoint.name,
        "model_fingerprint": checkpoint.fingerprint,
        "scores_sha256": scores.sha256,
        "dense_bytes": checkpoint.weight_bytes,
        "scope": request.budget_scope,
        "loss_unit": scores.loss_unit,
        "lines": [asdict(line) for line in lines],
    }


def materialize_bundle(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: ProgressCallback = quiet,
    cache: Path | None = None,
) -> Path:
    """Write the bundle of ``plan``, its factors fitted to what the target's quantizer makes of them.

    Raises as :func:`acip_export.materialize.materialize_bundle`, and
        MissingExtraError: the target's quantizer is not installed.
        ImatrixError: see :func:`converters.gguf.imatrix.importance_of`.
    """
    from acip_export import materialize
    from converters.registry import converter

    return materialize.materialize_bundle(
        checkpoint,
        _rounding_scores(checkpoint.with_options(plan.options), scores),
        plan,
        out,
        force,
        lambda p: progress(StageProgress("materialize", p.done, p.total, p.tensor)),
        converter(plan.target).round_trip,
        cache,
    )


def _rounding_scores(checkpoint: Checkpoint, scores: ScoreFile) -> ScoreFile:
    """``scores`` with the importance of the inputs that the user named in place of its own; the same file otherwise."""
    file = checkpoint.options.get("imatrix")
    if file is None:
        return scores
    from converters.gguf.imatrix import importance_of

    scores.check_model(checkpoint)
    given = importance_of(checkpoint, Path(file))
    weighted = {name: replace(scores.modules[name], input_moment=moment) for name, moment in given.items()}
    return replace(scores, modules={**scores.modules, **weighted})


def write_imatrix(checkpoint: Checkpoint, scores: ScoreFile, out: Path, force: bool = False) -> int:
    """Write the input moments of ``scores`` as llama.cpp's importance matrix; returns how many matrices it has.

    Raises:
        UsageError: ``out`` exists and ``force`` is false.
        ScoreFileError: of another model.
        UnsupportedError: an architecture whose tensors have no known names in llama.cpp.
    """
    from converters.gguf import imatrix

    scores.check_model(checkpoint)
    moments = {name: module.input_moment for name, module in scores.modules.items()}
    # What the moments were measured on; rankings that do not say used all of their text.
    tokens = int(scores.algorithm.get("statistics_tokens") or scores.data.get("tokens") or 0) or 1
    chunk = min(int(scores.algorithm.get("context") or tokens), tokens)
    measured = imatrix.Measured(str(scores.data.get("source", "unknown")), tokens, chunk)
    return imatrix.write_imatrix(checkpoint, moments, measured, out, force)


def convert_bundle(
    bundle: Path, out: Path, force: bool = False, progress: ProgressCallback = quiet, check: bool = True
) -> Plan:
    """Write the export of ``bundle`` into ``out``, whole or not at all, and return its plan.

    Raises:
        BundleError, PlanFileError: the bundle is damaged.
        VerificationError: the files are not byte for byte as large as planned.
        UsageError: ``out`` exists and ``force`` is false.
    """
    refuse_existing(out, force)
    opened = Bundle.open(bundle)
    with new_directory(out, force) as directory:
        _convert(opened, directory, progress, check)
    return opened.plan


def _convert(bundle: Bundle, directory: Path, progress: ProgressCallback, check: bool) -> None:
    from converters.registry import converter

    converter(bundle.plan.target).convert(
        bundle, directory, lambda p: progress(StageProgress("convert", p.done, p.total, p.item))
    )
    shutil.copyfile(bundle.path / PLAN_FILE, directory / verification.EXPORT_PLAN_FILE)
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
    progress: ProgressCallback = quiet,
    cache: Path | None = None,
) -> Report | None:
    """Materialize, convert and verify ``plan``; the directory ``out`` appears only when all of it went well.

    The bundle is kept beside the export only while it is needed.

    Args:
        text, tasks, timeout: see :func:`acip_export.verify.verify.verify_export`.
        sizes: for the slider of ``report.html``, see :func:`planned_sizes`; made from ``types`` if not given.

    Returns:
        The report, also written as ``report.json``, ``report.html`` and ``README.md``; ``None`` without ``verify``.

    Raises:
        VerificationError: bytes or numbers are not what was planned; nothing is left behind.
    """
    refuse_existing(out, force)
    with scratch_directory(out, ".bundle") as scratch, new_directory(out, force) as directory:
        bundle = scratch / "bundle"
        materialize_bundle(checkpoint, scores, plan, bundle, progress=progress, cache=cache)
        _convert(Bundle.open(bundle), directory, progress, check=True)
        if not verify:
            return None
        report = verification.verify_export(
            directory,
            bundle,
            text=text,
            dense=checkpoint.path,
            tasks=tasks,
            timeout=timeout,
            progress=lambda name: progress(StageProgress("verify", 0, 1, name)),
        )
        verification.require_passed(report)
        verification.save_report(report, directory)
        planned = planned_sizes(checkpoint, scores, plan, types) if sizes is None else sizes
        write_report(directory, checkpoint, scores, sizes=planned)
        return report


def ranked_model_of(plan: Plan, model: str, scores: Path | None) -> tuple[Checkpoint | None, ScoreFile | None]:
    """The model and score file that ``plan`` was made from; ``None`` where the working directory happens not to be it.

    Raises:
        CheckpointError, ScoreFileError: a model or a score file was named, and is not of the plan's model.
    """
    named = model != "." or scores is not None
    if not named and not Path(model, "config.json").is_file():
        return None, None
    try:
        checkpoint = Checkpoint.open(model)
        opened = open_scores(checkpoint, scores)
        opened.check_model(checkpoint)
    except (CheckpointError, ScoreFileError):
        if named:
            raise
        return None, None
    if checkpoint.fingerprint == plan.model_fingerprint:
        return checkpoint, opened
    if named:
        raise CheckpointError(
            f"{checkpoint.path} ({checkpoint.fingerprint[:12]}…) is not the model of this export, {plan.model} "
            f"({plan.model_fingerprint[:12]}…); name that one with  --model"
        )
    return None, None


def planned_sizes(
    checkpoint: Checkpoint, scores: ScoreFile, plan: Plan, types: tuple[str, ...] = (), count: int = 16
) -> tuple[Plan, ...]:
    """Plans at ``count`` budgets, from the smallest feasible one to the largest that is of use, for the same runtime.

    Args:
        types: that ``plan`` chose from, if not the target's own.
    """
    base = PlanRequest(
        target=plan.target,
        budget_bytes=1,
        budget_scope=plan.budget_scope,
        layout=plan.layout,
        types=types,
        context=plan.runtime.context,
        cache_type=plan.runtime.cache_type,
        execution=plan.runtime.execution,
        prompt_batch=plan.runtime.prompt_batch,
        options=plan.options,
    )
    problem = planning_problem(checkpoint, scores, base)
    smallest, _ = problem.floor(base)
    full = problem.plan(replace(base, budget_bytes=2**62), exact=False)
    largest = full.used_bytes
    made: dict[int, Plan] = {}
    for step in range(count - 1):
        # Equal factors: most of what happens to quality happens at the small sizes.
        budget = round(smallest * (largest / smallest) ** (step / (count - 1)))
        found = problem.plan(replace(base, budget_bytes=max(budget, smallest)), exact=False)
        made[found.used_bytes] = found
    made[largest] = replace(full, budget_bytes=largest, certificate=replace(full.certificate, bytes_left=0))
    return tuple(made[used] for used in sorted(made))


def write_report(
    export: Path,
    checkpoint: Checkpoint | None = None,
    scores: ScoreFile | None = None,
    others: Sequence[Path] = (),
    sizes: Sequence[Plan] = (),
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``README.md`` of an export from its ``plan.json`` and ``report.json``.

    Args:
        checkpoint, scores: of its model; without them, what an earlier ``report.html`` there says is kept.
        others: exports of the same model, target and layout, whose measured figures are shown too.

    Raises:
        PlanFileError, InputError: a plan or report is damaged, or of something else.
    """
    root = export if export.is_dir() else export.parent
    earlier = root / PAGE_FILE
    before = embedded(earlier.read_text(encoding="utf-8", errors="replace")) if earlier.is_file() else None
    found: list[Exported] = [read_export(path) for path in (root, *others)]
    page = build_page(
        found[0],
        found[1:],
        sizes,
        None if scores is None else _ranking(scores, checkpoint),
        None if scores is None else _score_map(scores),
        before,
    )
    return write_papers(page, root)


def _ranking(scores: ScoreFile, checkpoint: Checkpoint | None) -> Ranking:
    return Ranking(
        dict(scores.algorithm),
        dict(scores.data),
        dict(scores.versions),
        tuple((point.ratio, point.loss, point.loss_with_adapters) for point in scores.curve),
        license_of(checkpoint.path) if checkpoint else "",
        hub_id(checkpoint.path) if checkpoint else "",
    )


def _score_map(scores: ScoreFile) -> ScoreMap:
    units = {name: len(module.scores) for name, module in scores.modules.items()}

    def shares(ratios: Sequence[float]) -> list[dict[str, float]]:
        cuts = [scores.ranks_at(ratio) for ratio in ratios]
        return [{name: rank / units[name] for name, rank in ranks.items()} for ranks in cuts]

    return shares


def evaluation_text(model: Path, text: Path, context: int, most_tokens: int = 32_768) -> EvaluationText:
    """Token windows of a text, at most ``context`` or 1,024 tokens each, and ``most_tokens`` together.


    Longer windows would say little more about an export, and their logits take gigabytes.

    An encoder's are padded texts of up to ``context`` tokens.

    Args:
        model: a model directory or a bundle: its tokenizer is used.

    Raises:
        DataError: missing, not text, or shorter than one window.
    """
    from acip_export.text import pack_text, pad_texts

    if not Checkpoint.open(model).shape.generates:
        padded = pad_texts(model, text, context, least=3)
        return EvaluationText(padded.windows.numpy(), text.name, padded.sha256)
    window = min(context, _LONGEST_WINDOW)
    packed = pack_text(model, text, window)
    windows: Windows = packed.windows[: max(1, most_tokens // window)].numpy()
    return EvaluationText(windows, text.name, packed.sha256)


def verify_directory(
    export: Path,
    model: str,
    scores: Path | None,
    bundle: Path | None,
    text: Path | None,
    tasks: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    progress: ProgressCallback = quiet,
) -> Report:
    """Verify an export made earlier, and write its ``report.json``.

    Without a bundle it is materialized again, in a temporary directory. With one, the model may be absent: then nothing
    is compared with the dense model.

    Raises:
        PlanFileError: ``export`` has no plan. ScoreFileError, CheckpointError: the bundle cannot be made again.
        Others as :func:`acip_export.verify.verify.verify_export`.
    """
    plan = load_plan(export / verification.EXPORT_PLAN_FILE)
    checkpoint = _base_model(model, plan, required=bundle is None)
    with tempfile.TemporaryDirectory() as scratch:
        if bundle is None:
            assert checkpoint is not None
            bundle = materialize_bundle(checkpoint, open_scores(checkpoint, scores), plan, Path(scratch) / "bundle")
        report = verification.verify_export(
            export,
            bundle,
            text=None if text is None else evaluation_text(bundle, text, plan.runtime.context),
            dense=None if checkpoint is None else checkpoint.path,
            tasks=tasks,
            timeout=timeout,
            progress=lambda name: progress(StageProgress("verify", 0, 1, name)),
        )
    verification.save_report(report, export)
    return report


def _base_model(model: str, plan: Plan, required: bool) -> Checkpoint | None:
    """The model that was planned for, or ``None`` if something else is there."""
    try:
        checkpoint = Checkpoint.open(model)
    except CheckpointError:
        if required:
            raise
        return None
    return checkpoint if required or checkpoint.fingerprint == plan.model_fingerprint else None
