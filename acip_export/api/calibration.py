"""How much layers, and classes of them, lose when rounded: measured once for a format, kept beside the score file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from acip_export.api.rounding_errors import feedback_types
from acip_export.api.text import held_out_text
from acip_export.artifacts.measured_losses import (
    MeasuredLoss,
    MeasuredLosses,
    cache_file,
    load_measured_losses,
    save_measured_losses,
)
from acip_export.artifacts.plan import dumps_plan
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.io.kept_states import states_beside
from acip_export.machine import Machine
from acip_export.measurement.passes import ClassPass, layer_passes, passes_for
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Problem, SearchSpace, ServingRule
from acip_export.progress import ProgressCallback, silent
from acip_export.units import ceil_div, format_seconds
from acip_export.verification.export import EvaluationText
from acip_export.version import made_by

if TYPE_CHECKING:
    from torch import Tensor

    from acip_export.materialization.rounded_weights import RoundedWeights

# Of held-out text: the mean divergence of 1,024 tokens is within five per cent. Fewer for models and types that would
# take more than so many operations, which are minutes on two cores.
_WINDOW, _TOKENS, _LEAST_TOKENS = 512, 1024, 128
# Of each window so many at least: one page loses half as much again as the next, so that more of them say more.
_OF_A_WINDOW = 256
# To tell how the layers of a class differ, which is by many times, less text does.
_LAYER_TOKENS, _LAYER_WINDOW = 256, 128
_OPERATIONS = 4 * 10**13
# Operations that take half a minute on two cores.
_WORTH_SAYING = 2 * 10**12

logger = logging.getLogger(__name__)


def calibrated_errors(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    space: SearchSpace,
    errors: RoundingErrors,
    rule: ServingRule,
    progress: ProgressCallback = silent,
) -> tuple[RoundingErrors, tuple[str, ...]]:
    """Scale rounding errors to what layers and classes were measured to lose; what is not known yet is measured.

    Returns:
        The errors, and if they are as they were, the reason, in a sentence.
    """
    if not errors.dense:
        return errors, ()  # there is no quantizer here, and the plan says so
    kept_as = f"{space.format.name} {space.rounding}"
    cache = None if scores.file is None else cache_file(scores.file, space.format.name, space.rounding)
    nothing = MeasuredLosses(errors.format, errors.quantizer, errors.scores_sha256)
    known = load_measured_losses(cache, nothing) if cache else scores.measured_losses.get(kept_as, nothing)
    try:
        for more in _measured(checkpoint, scores, space, errors, rule, known, cache, progress):
            known = more
            if cache is None:
                scores.measured_losses[kept_as] = known
            else:
                save_measured_losses(known, cache)
    except (MissingExtraError, UnsupportedError) as reason:
        if not known.classes:
            return errors, (f"predicted losses are not calibrated on this model: {reason}",)
    return known.calibrated(errors), ()


def _measured(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    space: SearchSpace,
    errors: RoundingErrors,
    rule: ServingRule,
    known: MeasuredLosses,
    cache: Path | None,
    progress: ProgressCallback,
) -> Iterator[MeasuredLosses]:
    """Measure what ``known`` lacks, first layers, then classes on top of them, and yield what is known after each.

    Args:
        cache: unfinished passes are kept beside it.

    Raises:
        MissingExtraError, UnsupportedError: it cannot be measured here.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    embeddings = scores.embedding_sensitivity

    def classes_left(known: MeasuredLosses) -> tuple[ClassPass, ...]:
        wanted = passes_for(known.by_layers(errors), embeddings, shapes)
        return tuple(each for each in wanted if each.type not in known.by_class(each.inputs).get(each.name, {}))

    # Of a pass of so few tokens as a large model's are, each of which reads every weight, of two bytes or so, once.
    operations = float(checkpoint.weight_bytes * _LEAST_TOKENS)
    layers = tuple(
        each for each in layer_passes(errors, embeddings, shapes, operations) if each.name not in known.layers
    )
    classes = classes_left(known)
    if not layers and not classes:
        return
    text = _held_out(checkpoint, scores)
    from acip_export.measurement.classes import measure_classes

    few = _spread(checkpoint, text, ceil_div(len(layers), 2), _LAYER_WINDOW, _LAYER_TOKENS)
    _announce(checkpoint, space, ((layers, few, 0.5), (classes, _spread(checkpoint, text, len(classes)), 1.0)))
    weights = rounded_weights(checkpoint, scores, space)
    plan = Problem.of(checkpoint, scores, space, errors).largest("file", rule.at_every_budget(1))
    maker = made_by(f"torch {version('torch')}", known.quantizer)

    def losses_of(passes: tuple[ClassPass, ...], windows: Tensor, stage: str) -> list[MeasuredLoss]:
        listed = "\n".join(f"{each.name} {each.type} {each.inputs} {sorted(each.tensors)}" for each in passes)
        read = f"text {text.sha256}, windows {tuple(windows.shape)}"
        origin = f"{maker}\nscores {known.scores_sha256}\n{read}\n{dumps_plan(plan)}\n{listed}"
        exact = space.format.vector_type
        with states_beside(cache, origin) as kept:
            return measure_classes(checkpoint, weights, plan, exact, passes, windows, stage, progress, kept)

    if layers:
        losses = losses_of(layers, few, "calibrate layers")
        known = known.with_layers({each.name: {each.type: loss} for each, loss in zip(layers, losses, strict=True)})
        yield known
        classes = classes_left(known)
    if classes:
        # So many as suit those that are left, whether this process has measured the layers or another.
        windows = _spread(checkpoint, text, len(classes))
        losses = losses_of(classes, windows, "calibrate")
        known = replace(known, text_sha256=text.sha256, tokens=windows.numel())
        for each, loss in zip(classes, losses, strict=True):
            known = known.with_loss(each.name, each.type, each.inputs, loss)
        yield known


def takes_long(checkpoint: Checkpoint, passes: int, tokens: int) -> bool:
    """Tell whether passes of so many tokens through a model take so long that it is said before they begin."""
    return checkpoint.weight_bytes * passes * tokens >= _WORTH_SAYING


def _announce(
    checkpoint: Checkpoint, space: SearchSpace, rounds: Sequence[tuple[Sequence[ClassPass], Tensor, float]]
) -> None:
    """Say how long measuring takes, where that is a while.

    Args:
        rounds: passes, the tokens that go through them, and through which share of the blocks.
    """
    if not any(takes_long(checkpoint, len(passes), tokens.numel()) for passes, tokens, _ in rounds):
        return
    from acip_export.measurement.pass_time import pass_seconds

    machine = Machine.measured(checkpoint.shape.hidden)
    types = feedback_types(space)
    seconds = sum(
        pass_seconds(checkpoint, passes, space.format.name, tokens.numel(), types, machine, share)
        for passes, tokens, share in rounds
        if passes
    )
    logger.warning(
        "this model's first plan for %s measures what rounding its layers costs: about %s, once",
        space.format.name,
        format_seconds(seconds),
    )


def held_out_windows(
    checkpoint: Checkpoint, scores: ScoreFile, passes: int, least: int = _OF_A_WINDOW
) -> tuple[Tensor, str]:
    """Return windows (n, tokens) of text that the ranking held out, as many as time allows, and the text's SHA-256.

    They are spread over that text.

    Args:
        passes: how often they go through the model. least: tokens of a window at least, where there are so many.

    Raises:
        UnsupportedError: they are not here, or nothing that they could go through.
    """
    text = _held_out(checkpoint, scores)
    return _spread(checkpoint, text, passes, least), text.sha256


def _held_out(checkpoint: Checkpoint, scores: ScoreFile) -> EvaluationText:
    """Read what :func:`held_out_windows` cuts; raises as that."""
    if not checkpoint.shape.generates:
        raise UnsupportedError("that takes a model that generates text")
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise UnsupportedError("PyTorch and transformers are not installed")
    text = held_out_text(checkpoint, scores, min(_WINDOW, checkpoint.shape.max_context))
    if text is None:
        raise UnsupportedError("the text that the ranking held out is not here")
    return text


def _spread(
    checkpoint: Checkpoint, text: EvaluationText, passes: int, least: int = _OF_A_WINDOW, most: int | None = None
) -> Tensor:
    """Return windows of a text, as :func:`held_out_windows` says, of ``most`` tokens together if that is less."""
    import torch

    # Two operations a weight, of which a model has one for every two bytes or so.
    operations = checkpoint.weight_bytes * max(1, passes)
    tokens = max(_LEAST_TOKENS, min(most or _TOKENS, _OPERATIONS // operations, text.windows.size))
    there, longest = text.windows.shape
    count = min(there, max(1, tokens // min(least, longest)))
    places = torch.arange(count) * there // count
    return torch.from_numpy(text.windows)[places, : min(longest, tokens // count)]


def rounded_weights(checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace) -> RoundedWeights:
    """Return what makes the numbers of plans of a search space."""
    from acip_export.materialization.rounded_weights import RoundedWeights

    return RoundedWeights(checkpoint, scores, space.format.round_trip, feedback_types(space))
