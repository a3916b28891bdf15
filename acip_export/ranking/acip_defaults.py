"""Choose settings of the learned ranking that suit a model."""

from __future__ import annotations

import torch

from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking.config import AcipConfig
from acip_export.ranking.load import linear_weights

_PRUNED_SHARE = 0.7
_SMALL_WEIGHTS = 100_000_000
_SMALL_STEPS, _SMALL_TUNE = 100, 150
# Linear weights up to which processors learn within about half an hour.
_LEARNED_ON_PROCESSORS = 50_000_000
_LEARNED, _TRAINING_FREE = "acip", "fisher"


def default_algorithm(
    checkpoint: Checkpoint,
    device: str,
    settings: object = None,
    resume: bool = False,
    seconds: float | None = None,
) -> str:
    """Return the name of the algorithm for a model that none was named for: learned where that takes minutes.

    It follows from the arguments alone, so that the same command gives the same bytes again.

    Args:
        checkpoint: the model.
        device: of torch, or ``auto``.
        settings: hyper-parameters of the learned algorithm. If any are given, it is the one that is meant.
        resume: a run is to go on; only those of the learned algorithm can.
        seconds: a time to fill; only the learned algorithm gets better in more of it.
    """
    if settings or resume or seconds is not None:
        return _LEARNED
    small = linear_weights(checkpoint) <= _LEARNED_ON_PROCESSORS
    on_processors = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return _TRAINING_FREE if on_processors and not small else _LEARNED


def automatic_config(checkpoint: Checkpoint) -> AcipConfig:
    """Return the settings that were measured to rank best in minutes (docs/LOG.md).

    Masks start graded by the Fisher information of the components, and the divergence from the dense model, whose
    gradient starts at zero, only corrects that order. Near the end it is not small any more: to second order it cannot
    push out what all the rest was learned with. The learning rate follows from the number of mask steps: under
    Adam an undefended mask moves by one learning rate per step, and at the usual stop ratio about
    ``_PRUNED_SHARE`` of the graded range has to be crossed. Large models get the paper's number of steps.
    """
    weights = linear_weights(checkpoint)
    steps, tune, batch = (_SMALL_STEPS, _SMALL_TUNE, 2) if weights < _SMALL_WEIGHTS else (1000, 1000, 4)
    penalty = 0.1
    if not checkpoint.shape.generates:
        # A text is a few dozen tokens. Cosine distances are a third of what the same cuts cost in nats, or less, and
        # the penalty has to stay in proportion.
        batch, penalty = 8 * batch, 0.03
    scale = AcipConfig.mask_scale
    return AcipConfig(
        basis="kfac",
        objective="distill",
        start="drop-loss",
        predictor="fisher",
        second_order=True,
        post_tune=tune,
        post_tune_sizes="sampled",
        post_tune_decay=True,
        adapter_scaling="dropped",
        learning_rate=_PRUNED_SHARE * scale / steps,
        adapter_learning_rate=1e-3,
        penalty=penalty,
        penalty_growth=1.0,
        batch=batch,
    )


def mask_steps_of(config: AcipConfig) -> int:
    """Return about how many steps the masks take under Adam: a learning rate each, over the graded range."""
    return min(config.max_steps, round(_PRUNED_SHARE * config.mask_scale / config.learning_rate))
