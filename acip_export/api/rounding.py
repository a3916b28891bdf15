"""What the formats' quantizers cost on a model, measured once and kept beside its score file."""

from __future__ import annotations

import logging
from pathlib import Path

from acip_export.artifacts.rounding_errors import (
    RoundingErrors,
    cache_file,
    load_rounding_errors,
    pair_key,
    residual_key,
    save_rounding_errors,
)
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, SearchSpace, resolve
from acip_export.progress import ProgressCallback, silent

logger = logging.getLogger(__name__)


def rounding_errors(
    checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace, progress: ProgressCallback = silent
) -> RoundingErrors:
    """Measure what the format's quantizer costs on this model, for everything that ``space`` offers.

    Read from the cache beside the score file; what it lacks is measured once and added to it. Scores that are in no
    file keep what was measured themselves. Without the quantizer the answer is what is known.
    """
    from acip_export.planning.candidates import pair_types, residual_bases

    scores.check_model(checkpoint)
    fmt, types, layout = space.format, space.allowed, space.layout
    quantizer = fmt.quantizer()
    cache = None if scores.file is None else cache_file(scores.file, fmt.name)
    if cache is not None:
        known = load_rounding_errors(cache, fmt.name, quantizer, scores.sha256)
    else:
        known = scores.rounding_errors.get(fmt.name) or RoundingErrors(fmt.name, quantizer, scores.sha256)
    embedding_types = space.allowed_in_embedding
    dense = {
        name: tuple(
            f.name
            for f in (embedding_types if name in scores.embedding_sensitivity else types).of_row(info.shape[1])
            if not (f.needs_importance and name in scores.embedding_sensitivity)
        )
        for name, info in checkpoint.tensors.items()
        if name in scores.embedding_sensitivity or name.removesuffix(".weight") in scores.modules
    }
    columns = sorted({module.shape[1] for module in scores.modules.values()})
    pairs = () if layout.low_rank is None else pair_types(types, columns)
    bases = residual_bases(layout, types, columns)
    keys = [*(pair_key(*pair) for pair in pairs), *map(residual_key, bases)]
    if known.covers(dense, keys, scores.modules):
        return known

    from acip_export.materialization.rounding import measure_rounding

    try:
        measured = measure_rounding(
            checkpoint,
            scores,
            known,
            dense,
            pairs,
            bases,
            layout.residual_pairs,
            fmt.round_trip,
            progress,
        )
    except MissingExtraError as missing:
        logger.warning("rounding errors are those of Gaussian weights: %s", missing)
        return known
    if cache is not None:
        save_rounding_errors(measured, cache)
    else:
        scores.rounding_errors[fmt.name] = measured
    return measured


def measure_rounding_errors(checkpoint: Checkpoint, scores: Path, progress: ProgressCallback = silent) -> None:
    """Fill the caches beside a score file for the default layout and types of every format whose quantizer is here.

    Plans measure what is missing themselves; having it from the start makes the first one take seconds.
    """
    from acip_export.formats.registry import format_names

    opened = load_scores(scores)
    for name in format_names():
        try:
            rounding_errors(checkpoint, opened, resolve(PlanRequest(name), checkpoint).space, progress)
        except (MissingExtraError, UnsupportedError) as reason:
            logger.info("rounding errors of %s are not measured: %s", name, reason)
