"""Settings of a ranking: how it uses its text, and the hyper-parameters of what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from acip_export.artifacts.scores import AdapterScaling
from acip_export.choices import instead_of
from acip_export.errors import UsageError
from acip_export.text.packing import MOST_TOKENS

Basis = Literal["svd", "input", "kfac"]
Precision = Literal["auto", "float32", "model"]
Objective = Literal["ce", "distill"]
Start = Literal["ones", "drop-loss"]
TieBreak = Literal["drop-loss", "index"]
Predictor = Literal["kfac", "fisher"]
PostTuneSizes = Literal["stop", "sampled"]

CURVE_RATIOS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2)

# Products of a token and a linear weight that statistics take by default, and the tokens that these are at least and at
# most: text is nearly free for small models. Inputs cost a third of what gradients do, and need more of it: with four
# times the text, files of the same bytes lose four to ten per cent less; with twice the gradients one to three.
_INPUT_WORK, _GRADIENT_WORK = 4.2e12, 8.8e11
_LEAST_INPUTS, _LEAST_GRADIENTS, _MOST_INPUTS, _MOST_GRADIENTS = 8_192, 4_096, 40_960, 24_576
_WHOLE = 2_048


@dataclass(frozen=True)
class AcipConfig:
    """Set the hyper-parameters of the learned ranking. The defaults are the paper's (arXiv 2502.01717).

    Attributes:
        basis: ``svd`` (paper), ``input`` or ``kfac``: see :mod:`acip_export.lowrank.components`.
        objective: ``ce`` (paper), or ``distill``: KL divergence from the dense model, nats per token.
        start: initial masks all ``ones`` (paper), or graded by ``drop-loss``: of N components, the one with the i-th
            smallest predicted loss starts at i/N, so that the training-free order is what the loss then corrects.
        second_order: the loss pushes a mask down only as far as dropping its component, to second order, is predicted
            to lower the loss; to first order (paper), components that all others depend on are pushed down near the
            end, because a little less of them would help.
        predictor: of the loss of dropping a component: ``kfac`` from the moments, or ``fisher``, measured on the masks.
        stop_ratio: share of the linear layers' parameters at which the masks stop.
        post_tune: steps of the adapters alone after that.
        post_tune_sizes: masks while post-tuning: those of the ``stop`` ratio (paper), or of a ratio ``sampled``
            uniformly for every step, so that one set of adapters serves all sizes.
        smallest_sampled, largest_sampled: bounds of those ratios; 0 for the stop ratio.
        learning_rate: the one of AdamW, without weight decay. adapter_learning_rate: ``None``: the same (paper).
        post_tune_decay: lower the adapters' learning rate linearly to zero while post-tuning.
        mask_scale: masks are 1 at the start but stored as this, so that they move on the adapters' scale.
        penalty: weight of the masks' one-sided L1 norm, multiplied by penalty_growth every penalty_every steps.
        adapter_rank: 0 for none; capped at a quarter of a layer's smaller side.
        adapter_alpha, adapter_dropout: as in LoRA. adapter_scaling: ``constant`` (paper), or by the share of a layer
            that is ``dropped``: see :func:`acip_export.artifacts.scores.adapter_share`. While masks move it is
            constant.
        batch: windows per step.
        tie_break: order of components that were pruned in the same step.
        max_steps: the masks stop here at the latest.
    """

    basis: Basis = "svd"
    objective: Objective = "ce"
    start: Start = "ones"
    predictor: Predictor = "kfac"
    second_order: bool = False
    stop_ratio: float = 0.4
    post_tune: int = 1000
    post_tune_sizes: PostTuneSizes = "stop"
    smallest_sampled: float = 0.0
    largest_sampled: float = 1.0
    post_tune_decay: bool = False
    learning_rate: float = 5e-5
    adapter_learning_rate: float | None = None
    mask_scale: float = 0.02
    penalty: float = 1e-3
    penalty_growth: float = 1.01
    penalty_every: int = 4
    adapter_rank: int = 32
    adapter_alpha: float = 16.0
    adapter_dropout: float = 0.05
    adapter_scaling: AdapterScaling = "constant"
    batch: int = 4
    tie_break: TieBreak = "drop-loss"
    max_steps: int = 50_000

    def __post_init__(self) -> None:
        if not 0 < self.stop_ratio < 1:
            raise UsageError(f"stop ratio {self.stop_ratio} must lie between 0 and 1")
        if not 0 <= self.smallest_sampled < self.largest_sampled <= 1:
            raise UsageError(
                f"sizes sampled from {self.smallest_sampled} to {self.largest_sampled} must rise, between 0 and 1"
            )
        if self.post_tune < 0 or self.adapter_rank < 0:
            raise UsageError(
                f"post-tune steps {self.post_tune} and adapter rank {self.adapter_rank} cannot be negative"
            )
        if self.batch < 1 or self.max_steps < 1 or self.penalty_every < 1:
            raise UsageError("batch, max_steps and penalty_every must be at least 1")
        if (
            min(self.learning_rate, self.adapter_learning_rate or self.learning_rate, self.mask_scale, self.penalty)
            <= 0
        ):
            raise UsageError("learning rate, mask scale and penalty must be positive")


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read hyper-parameters of :class:`AcipConfig` from ``NAME=VALUE``.

    Raises:
        UsageError: unknown name, or a value of the wrong kind.
    """
    hints = get_type_hints(AcipConfig)
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in hints or not equals:
            known = instead_of(name, hints, "the names are")
            raise UsageError(f"{text!r} sets no hyper-parameter; write NAME=VALUE; {known}")
        settings[name] = _parsed(name, value.strip(), hints[name])
    return settings


def _parsed(name: str, value: str, hint: Any) -> Any:
    choices = get_args(hint) if get_origin(hint) is Literal else None
    switches = {"true": True, "false": False}
    try:
        if choices is not None:
            return choices[choices.index(value)]
        if hint is bool:
            return switches[value.lower()]
        return int(value) if hint is int else float(value)
    except (ValueError, KeyError):
        wanted = choices or (tuple(switches) if hint is bool else ("a whole number",) if hint is int else ("a number",))
        raise UsageError(f"{name} is {value!r}, expected {' or '.join(wanted)}") from None


@dataclass(frozen=True)
class DataConfig:
    """Set how the calibration text is used.

    Attributes:
        context: tokens per window; ``None``: 512, or the model's limit if that is smaller.
        statistics_tokens: how many from the front of the text the second moments of inputs are measured on, and
        gradient_tokens: how many of these the moments of gradients and the Fisher information are measured on;
            ``None``: what suits the model's size.
        curve_tokens: how many from its end, at most a fifth of it, the curve is measured on; nothing else sees them.
        batch: windows per forward pass of statistics and curve.
        seed: of label sampling, adapters, dropout, the order of the windows, and text of the model's own.
        field: what is read of a record: see :func:`acip_export.text.documents.read_documents`.
        curve_ratios: sizes that the curve is measured at, falling from 1.
        most_tokens: how many of the text are used at most, from its front. self_tokens: how many ``self`` samples.
    """

    context: int | None = None
    statistics_tokens: int | None = None
    gradient_tokens: int | None = None
    curve_tokens: int = 2_048
    batch: int = 4
    seed: int = 0
    field: str | None = None
    most_tokens: int = MOST_TOKENS
    self_tokens: int = 131_072
    curve_ratios: tuple[float, ...] = CURVE_RATIOS

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise UsageError(f"context {self.context} must be at least 2 tokens: one to read, one to predict")
        ratios = self.curve_ratios
        if not ratios or ratios[0] != 1 or ratios[-1] < 0 or any(a <= b for a, b in pairwise(ratios)):
            raise UsageError(f"the curve's ratios {ratios} must fall from 1")

    def for_weights(self, weights: int) -> DataConfig:
        """Choose what was left open for a model whose linear layers have so many weights."""

        def tokens(work: float, least: int, most: int) -> int:
            return min(max(int(work / weights) // _WHOLE * _WHOLE, least), most)

        inputs = self.statistics_tokens or tokens(_INPUT_WORK, _LEAST_INPUTS, _MOST_INPUTS)
        gradients = self.gradient_tokens or tokens(_GRADIENT_WORK, _LEAST_GRADIENTS, _MOST_GRADIENTS)
        gradients = min(gradients, inputs)
        return replace(self, statistics_tokens=inputs, gradient_tokens=gradients)
