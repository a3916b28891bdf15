"""What each type of KV cache costs: measured once in the runtime itself, on text that the ranking held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from acip_export.api.calibration import held_out_windows
from acip_export.api.rank import rounding_scores
from acip_export.artifacts.cache_losses import CacheLosses, load_cache_losses, save_cache_losses
from acip_export.artifacts.plan import Serving
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import MissingExtraError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Problem, SearchSpace
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.verification.metrics import compare_logits

_PROMPT_BATCH = 128


def known_cache_losses(scores: ScoreFile, space: SearchSpace) -> CacheLosses:
    """Return what was measured of the format's cache types; empty: nothing yet."""
    try:
        runtime = space.format.quantizer()
    except MissingExtraError:
        runtime = ""
    return load_cache_losses(scores.file, CacheLosses(space.format.name, runtime, scores.sha256))


def measured_cache_losses(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    space: SearchSpace,
    types: tuple[str, ...],
    progress: ProgressCallback,
) -> CacheLosses:
    """Return the loss of every one of ``types``, measured where it is not known yet.

    An export with the format's most precise weights is run with each type, of keys and of values alone, and compared
    with itself with the default type. Progress says how long the rest takes.

    Raises:
        UnsupportedError: the text that the ranking held out is not here. MissingExtraError: the runtime is not.
    """
    known = known_cache_losses(scores, space)
    own = next(iter(space.format.cache_types))
    sides = [
        (side, name)
        for side, measured in (("keys", known.keys), ("values", known.values))
        for name in types
        if name not in measured and name != own
    ]
    if not sides:
        return known
    try:
        windows, text_sha256 = held_out_windows(checkpoint, scores, 2 * len(sides))
    except UnsupportedError as reason:
        raise UnsupportedError(f"--cache-type auto measures what each type costs: {reason}; name a type") from None
    found: dict[str, dict[str, float]] = {
        "keys": {own: 0.0, **known.keys},
        "values": {own: 0.0, **known.values},
    }
    count, length = windows.shape
    serving = Serving(length, own, min(_PROMPT_BATCH, length), space.backend)
    clock = Clock("KV cache types", count * len(sides), progress)
    with TemporaryDirectory(prefix="acip-export-") as directory:
        export = Path(directory) / "export"
        _most_precise(checkpoint, scores, space, serving, export)
        session = space.format.sessions[0]
        for window in windows.numpy():
            with session.open(export, serving) as opened:
                reference = list(opened.logits(window[None]))
            for side, name in sides:
                keys, values = (name, own) if side == "keys" else (own, name)
                changed = replace(serving, cache_type_k=keys, cache_type_v=values)
                with session.open(export, changed) as opened:
                    kl = compare_logits(reference, opened.logits(window[None]), ([], [])).mean_kl
                found[side][name] = found[side].get(name, 0.0) + max(0.0, kl) / count
                clock.advance()
    losses = replace(known, text_sha256=text_sha256, tokens=windows.numel(), keys=found["keys"], values=found["values"])
    if scores.file is not None:
        save_cache_losses(losses, scores.file)
    return losses


def _most_precise(checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace, serving: Serving, out: Path) -> None:
    """Write an export of the dense weights in half precision."""
    from acip_export.materialization import PlannedModel

    format = space.format
    plain = next((layout for layout in format.layouts if layout.low_rank is None), None)
    if plain is None:
        raise UsageError(f"{format.name} has no layout of dense weights to measure its cache types with; name a type")
    precise = replace(space, layout=plain, types=(format.type("f16"),), rounding="nearest")
    plan = Problem.of(checkpoint, scores, precise).largest("file", serving)
    out.mkdir()
    format.convert(PlannedModel(checkpoint, rounding_scores(checkpoint, scores), plan, format.round_trip), out, silent)
