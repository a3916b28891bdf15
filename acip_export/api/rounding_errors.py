"""Measure what the formats' quantizers cost on a model, once, and keep it beside the score file."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.artifacts.cache import kept_as_it_grows
from acip_export.artifacts.rounding_errors import (
    RoundingErrors,
    cache_file,
    load_rounding_errors,
    pair_key,
    residual_key,
    save_rounding_errors,
)
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.errors import MissingExtraError, UnsupportedError, UsageError
from acip_export.formats.registry import export_format, format_names
from acip_export.machine import Machine
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import HEAD, is_embedding
from acip_export.planning import PlanRequest, SearchSpace, resolve
from acip_export.progress import ProgressCallback, silent, types_stage
from acip_export.rounding.quantizer import FEEDBACK_VERSION
from acip_export.weight_types import WeightType, weight_type

if TYPE_CHECKING:
    from acip_export.measurement.rounding_time import RoundingWork

logger = logging.getLogger(__name__)


def settle_rounding(scores: ScoreFile, request: PlanRequest) -> tuple[PlanRequest, tuple[str, ...]]:
    """Decide how codes are chosen where the request leaves it open: with error feedback, if that is possible.

    Returns:
        The request with its rounding named, and what the user has to know about it, a sentence each.

    Raises:
        UsageError: error feedback was asked for and is not possible.
    """
    if not export_format(request.format, request.backend).feedback_types:
        if request.rounding == "feedback":
            raise UsageError(
                f"{request.format} has no type that is rounded with error feedback; use  --rounding nearest"
            )
        return replace(request, rounding="nearest"), ()
    hindrance: str | None = None
    if not any(module.input_key for module in scores.modules.values()):
        hindrance = "the score file has no second moments of the layers' inputs"
        if scores.slim:
            hindrance += f" ({scores.whole_again}  makes one that has)"
    elif "imatrix" in request.options:
        hindrance = "second moments and importance matrix would be of different texts"
    if request.rounding == "nearest" or hindrance is None:
        return replace(request, rounding=request.rounding or "feedback"), ()
    if request.rounding == "feedback":
        raise UsageError(f"--rounding feedback is not possible: {hindrance}; use  --rounding nearest")
    return replace(request, rounding="nearest"), (f"weights are rounded to the nearest code: {hindrance}",)


def rounding_errors(
    checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace, progress: ProgressCallback = silent
) -> RoundingErrors:
    """Measure what the format's quantizer costs on this model, for everything that ``space`` offers.

    Read from the cache beside the score file; what it lacks is measured once and added to it. Scores that are in no
    file keep what was measured themselves. Without the quantizer the answer is what is known.
    """
    scores.check_model(checkpoint)
    fmt, layout = space.format, space.layout
    with_feedback = feedback_types(space)
    quantizer = fmt.quantizer() + (f", error feedback and channel scales {FEEDBACK_VERSION}" if with_feedback else "")
    kept_as = f"{fmt.name} {space.rounding}"
    cache = None if scores.file is None else cache_file(scores.file, fmt.name, space.rounding)
    if cache is not None:
        known = load_rounding_errors(cache, fmt.name, quantizer, scores.sha256)
    else:
        known = scores.rounding_errors.get(kept_as) or RoundingErrors(fmt.name, quantizer, scores.sha256)
    dense = {
        name: tuple(form.name for form in types)
        for name, types in _dense_types(checkpoint, space, scores.embedding_sensitivity, scores.modules).items()
    }
    pairs, bases = _pairs(space, (module.shape for module in scores.modules.values()))
    keys = [*(pair_key(*pair) for pair in pairs), *map(residual_key, bases)]
    if known.covers(dense, keys, scores.modules):
        return known

    from acip_export.materialization.channel_scales import scale_channels
    from acip_export.measurement.rounding_errors import measure_rounding

    def save(measured: RoundingErrors) -> bool:
        if cache is not None:
            return save_rounding_errors(measured, cache)
        scores.rounding_errors[kept_as] = measured
        return True

    read, read_with = scale_channels(checkpoint, scores) if with_feedback else (checkpoint, scores)
    try:
        with kept_as_it_grows(save) as grown:
            return measure_rounding(
                read,
                read_with,
                known,
                dense,
                pairs,
                bases,
                layout.residual_pairs,
                fmt.round_trip,
                progress,
                with_feedback,
                grown,
            )
    except MissingExtraError as missing:
        logger.warning("rounding errors are those of Gaussian weights: %s", missing)
        return known


def feedback_types(space: SearchSpace) -> frozenset[str]:
    """Return the types that plans of a search space round with error feedback."""
    return space.format.feedback_types if space.rounding == "feedback" else frozenset()


def _dense_types(
    checkpoint: Checkpoint, space: SearchSpace, embeddings: Collection[str], modules: Collection[str]
) -> dict[str, tuple[WeightType, ...]]:
    """Return the types that each matrix may take: embeddings, an untied head, and linear layers."""
    found = {}
    for name, info in checkpoint.tensors.items():
        if name in embeddings:
            fitting = space.allowed_in_embedding.of_row(info.shape[1])
            found[name] = tuple(form for form in fitting if not form.needs_importance)
        elif name.removesuffix(".weight") in modules:
            found[name] = space.allowed.of_row(info.shape[1])
    return found


def _pairs(
    space: SearchSpace, shapes: Iterable[tuple[int, int]]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the types of pairs, and of bases with a correction, that layers of these shapes may become."""
    from acip_export.planning.candidates import pair_types, residual_bases

    columns, layout = sorted({inputs for _, inputs in shapes}), space.layout
    pairs = () if layout.low_rank is None else pair_types(space.allowed, columns)
    return pairs, residual_bases(layout, space.allowed, columns)


def rounding_estimate(checkpoint: Checkpoint, machine: Machine) -> dict[str, float]:
    """Return about how long :func:`measure_rounding_errors` takes, by format; of what the model does not have, nothing.

    No weight is read.
    """
    found: dict[str, float] = {}
    factors_kept = False
    for name in format_names():
        with suppress(MissingExtraError, UnsupportedError):
            work = rounding_work(checkpoint, name)
            found[types_stage(name)] = replace(work, factors_kept=factors_kept).seconds(machine)
            # One format makes them for all: inputs and their scales are the same.
            factors_kept = factors_kept or bool(work.feedback_types)
    return found


def rounding_work(checkpoint: Checkpoint, format: str) -> RoundingWork:
    """Return the sizes that measuring the default types of a format depends on.

    Raises:
        UnsupportedError: the model has none.
    """
    from acip_export.measurement.rounding_time import RoundingWork
    from acip_export.ranking.estimate import RankModel

    fmt = export_format(format)
    request = PlanRequest(format, rounding="feedback" if fmt.feedback_types else "nearest")
    space, modules = resolve(request, checkpoint).space, checkpoint.linear_modules
    embeddings = [name for name in checkpoint.tensors if is_embedding(name) or name == HEAD]
    types = _dense_types(checkpoint, space, embeddings, modules)
    shapes = {name: (checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in types}
    # A correction of a base, which no default layout has, is left out.
    pairs, _ = _pairs(space, modules.values())
    return RoundingWork(
        shapes,
        types,
        [*RankModel(checkpoint).moment_columns, *(shapes[name][1] for name in embeddings)],
        list(modules),
        [(weight_type(format, down), weight_type(format, up)) for down, up in pairs],
        feedback_types(space),
    )


def measure_rounding_errors(checkpoint: Checkpoint, scores: Path, progress: ProgressCallback = silent) -> None:
    """Fill the caches beside a score file for the default layout and types of every format whose quantizer is here.

    Plans measure what is missing themselves; having it from the start makes the first one take seconds.
    """
    opened = load_scores(scores)
    for name in format_names():
        try:
            request, _ = settle_rounding(opened, PlanRequest(name))
            rounding_errors(checkpoint, opened, resolve(request, checkpoint).space, progress)
        except (MissingExtraError, UnsupportedError) as reason:
            logger.info("rounding errors of %s are not measured: %s", name, reason)
