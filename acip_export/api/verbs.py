"""The four verbs: rank a model, plan an export, write it, prove it. Paths are text or :class:`~pathlib.Path`.

    >>> import acip_export
    >>> scores = acip_export.rank("model", "text.txt")
    >>> plan = acip_export.plan("model", scores, budget="900MB", format="onnx")
    >>> report = acip_export.export(plan, "export", model="model", scores=scores)
    >>> report.passed
    True

Every error is a class of :mod:`acip_export.errors`; its message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from acip_export.api.opening import Location, open_model, open_scores
from acip_export.artifacts.plan import BudgetScope, Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import CheckpointError, MissingExtraError, UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.rounding.quantizer import Rounding
from acip_export.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from acip_export.artifacts.report import Report

logger = logging.getLogger(__name__)

_NONE: Mapping[str, Any] = MappingProxyType({})
_LONGEST_WAIT = 600.0


def rank(
    model: Location | Checkpoint,
    data: Location,
    *,
    out: Location | None = None,
    algorithm: str | None = None,
    field: str | None = None,
    context: int | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] = _NONE,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> ScoreFile:
    """Learn which components of a model matter: one run serves every size afterwards.

    Args:
        model: a model directory, or a Hugging Face id (``revision`` and ``token`` are the hub's).
        data: calibration text: a file (plain, ``.jsonl``, ``.parquet``), a directory of them, a Hugging Face data set,
            or ``self``: text sampled from the model.
        out: where the score file is written; ``None``: it is only returned.
        algorithm: ``acip`` learns the order; see ``acip-export rank --help`` for those that need no training.
            ``None``: ``acip``, or ``fisher`` where learning would take hours.
        field: of records: the text, or a chat. context: tokens per window; ``None``: 512, or the model's limit.
        seed: of everything random. device: of torch; ``auto``: a GPU where there is one.
        settings: hyper-parameters of ``acip``, in place of those that suit the model.
        force: replace an earlier score file.
        options: the others of :func:`acip_export.ranking.rank_model`: ``precision``, ``progress``, ``resume``, ...

    Raises:
        UsageError: unknown algorithm, or ``out`` may not be written. DataError, MissingExtraError: the text.
        CheckpointError, UnsupportedError: the model. RankingError: the run diverged.
    """
    from acip_export.model.opening import check_checkpoint
    from acip_export.ranking import DataConfig, automatic_config, rank_model

    checkpoint = open_model(model, revision, token)
    check_checkpoint(checkpoint)
    _warn_of_formats(checkpoint)
    return rank_model(
        checkpoint.path,
        os.fspath(data),
        algorithm=algorithm,
        acip=replace(automatic_config(checkpoint), **settings) if settings else None,
        calibration=DataConfig(context=context, seed=seed, field=field),
        device=device,
        out=None if out is None else Path(out),
        force=force,
        **options,
    )


def plan(
    model: Location | Checkpoint,
    scores: Location | ScoreFile | None = None,
    *,
    budget: str | int,
    format: str,
    scope: BudgetScope = "memory",
    layout: str | None = None,
    types: Sequence[str] = (),
    runtime: str | None = None,
    backend: str | None = None,
    context: int | Literal["max"] | None = None,
    max_loss: float | None = None,
    min_speed: float | None = None,
    cache_type: str | None = None,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    prompt_batch: int | None = None,
    rounding: Rounding | None = None,
    calibrate: bool = True,
    candidates: int = 1,
    tune: str | float | None = None,
    options: Mapping[str, str] = _NONE,
    progress: ProgressCallback = silent,
    revision: str | None = None,
    token: str | None = None,
) -> Plan:
    """Decide what becomes of every tensor, so that the export fits a budget and loses as little as possible.

    Args:
        model, revision, token: as in :func:`rank`.
        scores: what :func:`rank` returned or wrote; ``None``: the one beside the model.
        budget: ``"900MB"``, ``"2GiB"``, ``"50%"`` of the dense weights, or bytes. scope: what it covers: ``memory``:
            files, cache and buffers; ``process``: the runtime too; ``anonymous``: what of that the system cannot
            drop, so no mapped weights; ``file``: only the files.
        format: ``gguf``, ``onnx``, or an installed one. layout, types, runtime, backend: of the format;
            ``acip-export formats`` lists them.
        context: tokens of KV cache; ``None``: the model's, at most 4096; ``max``: the longest that fits with a
            predicted loss of at most ``max_loss``, or, without, of 0.01 nats more than the shortest.
        min_speed: tokens a second that an answer with a full context must be predicted with, on this machine, which
            ``acip-export calibrate`` has measured.
        cache_type: of the cache; ``auto``: what loses least together with the weights; ``None``: the format's, or
            ``auto`` where that takes a tenth of the budget. cache_type_k, cache_type_v: of its keys or values alone.
        prompt_batch: prompt tokens processed together; ``None``: suits the budget.
        rounding: ``feedback`` carries the error of each weight to those that are rounded after it, ``nearest`` does
            not; ``None``: ``feedback`` where format and score file allow it.
        calibrate: scale predictions to what rounding layers and classes of them was measured to cost; the first plan of
            a format measures it, which takes minutes.
        candidates: plans that are run on held-out text before the best is taken; 1: the prediction alone chooses.
        tune: ``"10min"``, or seconds: for so long scales, norms and factor pairs are tuned towards the dense model
            before the export is written; it needs the ranking's text.
        options: settings that only this format knows, as its flags are called (``split_max_size``).

    Raises:
        InfeasibleBudgetError: no plan fits; the message says what would. UnreachableSpeedError: none is fast enough.
        ScoreFileError: not of this model. UsageError, UnsupportedError: what was asked contradicts itself or the model.
    """
    from acip_export.api.plan import plan_export
    from acip_export.devices import speeds_of
    from acip_export.formats.registry import export_format
    from acip_export.planning import PlanRequest

    checkpoint = open_model(model, revision, token)
    parsers = {option.name: option.parse for option in export_format(format).options}
    request = PlanRequest(
        format,
        budget if isinstance(budget, int) else parse_bytes(budget, whole=lambda: checkpoint.weight_bytes),
        scope,
        runtime=runtime,
        backend=backend,
        layout=layout,
        types=tuple(types),
        context=context,
        max_loss=max_loss,
        cache_type=cache_type,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        prompt_batch=prompt_batch,
        rounding=rounding,
        calibrate=calibrate,
        candidates=candidates,
        speeds=speeds_of(None, needed=min_speed is not None),
        min_speed=min_speed,
        tune_seconds=parse_seconds(tune, "tune") if isinstance(tune, str) else tune,
        options={name: parsers.get(name, str)(text) for name, text in options.items()},
    )
    return plan_export(checkpoint, open_scores(checkpoint, scores), request, progress)


def export(
    plan: Plan | Location,
    out: Location,
    *,
    model: Location | Checkpoint = ".",
    scores: Location | ScoreFile | None = None,
    text: Location | None = None,
    tasks: Sequence[str] = (),
    verify: bool = True,
    force: bool = False,
    timeout: float = _LONGEST_WAIT,
    cache: Location | None = None,
    keep_bundle: bool = False,
    progress: ProgressCallback = silent,
) -> Report | None:
    """Write a plan's export into ``out`` and prove it in its runtimes.

    It appears when it is written, whole, and is marked (``UNVERIFIED.txt``) until it has passed; an earlier export is
    replaced only by one that has.

    Args:
        plan: what :func:`plan` returned, or a ``plan.json``. model, scores: that it was made from.
        text: to measure perplexity and divergence from the dense model on; ``None``: what the ranking held out, where
            it is here. tasks: of lm-evaluation-harness.
        verify: open the export in its runtimes and compare. timeout: seconds that a runtime may take.
        force: replace an earlier export. cache: directory that keeps factors, and the dense
            model's states on the text, for other sizes. keep_bundle: write the bundle too, as ``OUT-bundle``.

    Returns:
        The report, also in ``out`` (``report.json``, ``report.html``, ``README.md``); ``None`` without ``verify``.

    Raises:
        UsageError: ``out`` may not be written. VerificationError: numbers are not what was planned; the export stays.
        PlanFileError, CheckpointError, ScoreFileError: plan, model and score file do not belong together.
    """
    from acip_export.api.export import export_model
    from acip_export.api.text import text_to_measure
    from acip_export.artifacts.export_directory import EXPORT_KIND
    from acip_export.io.outputs import claim_output

    checkpoint = open_model(model)
    read = (*(each for each in (plan, scores) if isinstance(each, str | os.PathLike)), text, cache, *tasks)
    claim_output(Path(out), EXPORT_KIND, force, read, checkpoint.path)
    known, opened = _open_plan(plan), open_scores(checkpoint, scores)
    given = None if text is None else Path(text)
    return export_model(
        checkpoint,
        opened,
        known,
        Path(out),
        force,
        verify,
        text_to_measure(checkpoint, opened, given, known.serving.context) if verify or given else None,
        tasks,
        timeout,
        progress=progress,
        cache=None if cache is None else Path(cache),
        keep_bundle=keep_bundle,
    )


def verify(
    export: Location,
    *,
    model: Location | Checkpoint = ".",
    scores: Location | ScoreFile | None = None,
    bundle: Location | None = None,
    text: Location | None = None,
    tasks: Sequence[str] = (),
    timeout: float = _LONGEST_WAIT,
    progress: ProgressCallback = silent,
) -> Report:
    """Prove an export that was made earlier: its files, its numbers in the real runtimes, its memory and its speed.

    Args:
        export: its directory. model, scores: that it was made from. bundle: its bundle; ``None``: made again.
        text, tasks, timeout: as in :func:`export`.

    Returns:
        The report, also written as ``report.json``; ``report.passed`` says whether every check held.

    Raises:
        PlanFileError: ``export`` has no plan. BundleError, CheckpointError, ScoreFileError: of something else.
        RuntimeCrashError, RuntimeHangError: a runtime died or did not answer.
    """
    from acip_export.api.verify import verify_directory

    return verify_directory(
        Path(export),
        model,
        scores,
        None if bundle is None else Path(bundle),
        None if text is None else Path(text),
        tasks,
        timeout,
        progress,
    )


def _warn_of_formats(checkpoint: Checkpoint) -> None:
    """Name the formats that cannot hold the model, before hours go into its ranking."""
    from acip_export.formats.registry import export_formats

    for known in export_formats():
        try:
            known.check_model(checkpoint)
        except (UnsupportedError, CheckpointError) as reason:
            logger.warning("%s has no export as %s: %s", checkpoint.path, known.name, reason)
        except MissingExtraError:
            continue


def _open_plan(plan: Plan | Location) -> Plan:
    from acip_export.artifacts.plan import load_plan

    return plan if isinstance(plan, Plan) else load_plan(Path(plan))
