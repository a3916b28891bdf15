"""Makes what is stored of a plan's decisions: the same numbers every time, whoever asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import PlanFileError, ScoreFileError
from acip_export.io.scratch import ArrayStore
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization.channel_scales import ScaledCheckpoint, scale_channels
from acip_export.materialization.factors import Norm, Pair, basis_moments, dense_weight, factor_pair, inner_importance
from acip_export.materialization.feedback_factors import FeedbackFactors, matrices_with_feedback, rows_with_feedback
from acip_export.materialization.refit import balanced, refit
from acip_export.materialization.residual import correct
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.quantizer import InputMoments, RoundTrip
from acip_export.weight_types import weight_type

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stored:
    """What is stored of a decision, by name.

    Attributes:
        importance: of the matrices, as far as it is known; see
            :meth:`acip_export.artifacts.materialized.MaterializedModel.importance`.
    """

    numbers: dict[str, Tensor]
    importance: dict[str, Tensor] = field(default_factory=dict)


class PlanNumbers:
    """Makes the tensors of one plan, before they are rounded.

    Args:
        round_trip: the quantizer of the plan's format; factor pairs are then fitted to what it makes of them. ``None``
            leaves them as the ranking has them.
        feedback_types: of the plan's format, those that it can round with error feedback.
        feedback: makes factors of inputs, scaled or not; ``None``: one of its own, which keeps those in ``store``
            that the user's cache does not.
        tuned_factors: of pairs, by the names that they are stored under, in the place of the ranking's.

    Attributes:
        checkpoint, scores: with the channels scaled, where the plan rounds with error feedback.
        matrices: the key of the input of every stored matrix that is rounded with error feedback.
        rows: the key of the output gradients of those whose rows make up for each other's errors.

    Raises:
        ScoreFileError: see :func:`acip_export.materialization.feedback_factors.matrices_with_feedback`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scores: ScoreFile,
        plan: Plan,
        round_trip: RoundTrip | None,
        factors: FactorCache,
        feedback_types: Collection[str] = (),
        feedback: FeedbackFactors | None = None,
        store: ArrayStore | None = None,
        tuned_factors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        if plan.rounding == "feedback" and feedback_types:
            checkpoint, scores = scale_channels(checkpoint.with_options(plan.options), scores, plan)
        self.checkpoint, self.scores, self.plan = checkpoint, scores, plan
        self._round_trip, self._factors, self._tuned = round_trip, factors, tuned_factors
        self.matrices = matrices_with_feedback(plan, scores, feedback_types)
        self.rows = rows_with_feedback(plan, scores, self.matrices)
        self.feedback = feedback or FeedbackFactors(scores, store)

    def scaled_sides(self, name: str) -> tuple[bool, bool]:
        """Tell whether the columns and the rows of a tensor are scaled."""
        return self.checkpoint.scaled_sides(name) if isinstance(self.checkpoint, ScaledCheckpoint) else (False, False)

    def dtype(self, decision: TensorDecision) -> str:
        """Return the safetensors dtype of what is stored of a decision: the checkpoint's where nothing changes it."""
        exact = decision.rank is None and not any(self.scaled_sides(decision.name)) and not self._has_adapter(decision)
        return self.checkpoint.tensors[decision.name].dtype if exact else "F32"

    def make(self, decision: TensorDecision) -> Stored:
        """Make the tensors of a decision.

        Raises:
            CheckpointError: the weight is not finite, or its file has changed.
            ScoreFileError, PlanFileError: the decision cannot be made from these scores.
        """
        weight, module = self.checkpoint.read(decision.name), self._module(decision)
        if decision.rank is None:
            importance = self.dense_importance(decision)
            return Stored(
                {decision.name: dense_weight(weight, module, self.plan.adapters)},
                {} if importance is None else {decision.name: importance},
            )
        self._check_whole(decision)
        if module is not None and decision.representation == "residual":
            return self._residual(weight, module, decision)
        return self._pair(weight, *self._ranked(decision), decision)

    def dense_importance(self, decision: TensorDecision) -> Tensor | None:
        """Return the importance of a matrix that stays one; no weight is read for it."""
        module = self._module(decision)
        if module is not None:
            return torch.from_numpy(module.input_moment)
        if decision.name in self.matrices:
            return torch.from_numpy(self.scores.second_moments[self.matrices[decision.name]].diagonal)
        return None

    def _module(self, decision: TensorDecision) -> ModuleScores | None:
        return self.scores.modules.get(decision.module) if decision.name.endswith(".weight") else None

    def _has_adapter(self, decision: TensorDecision) -> bool:
        """Whether a dense weight is changed by one."""
        module = self.scores.modules.get(decision.module)
        return self.plan.adapters and module is not None and module.adapter(len(module.scores)) is not None

    def pair(self, decision: TensorDecision) -> Pair:
        """Return a pair in the place of a weight as it is before it is rounded, its factors balanced; raises as
        :meth:`make`."""
        self._check_whole(decision)
        weight, (module, kept) = self.checkpoint.read(decision.name), self._ranked(decision)
        norm = Norm.of(module, self.scores.second_moments, weight)
        return balanced(self._factored(weight, module, kept, decision), norm)

    def _check_whole(self, decision: TensorDecision) -> None:
        if self.scores.slim:
            raise ScoreFileError(
                f"{decision.name} is to be factored, and the score file is slim: it has no second moments for that.\n"
                f"Make one that has:  {self.scores.whole_again}"
            )

    def _ranked(self, decision: TensorDecision) -> tuple[ModuleScores, Ranges]:
        """Return the scores of a pair, and the components that it keeps."""
        module = self._module(decision)
        if module is None or decision.kept is None:
            raise PlanFileError(f"{decision.name} is to be factored, but was never ranked; plan again")
        return module, decision.kept

    def _factored(self, weight: Tensor, module: ModuleScores, kept: Ranges, decision: TensorDecision) -> Pair:
        """Return what was tuned, or what the ranking keeps."""
        up, down = stored_tensors(decision.name, decision.shape, decision.rank)
        if up in self._tuned:
            return Pair(self._tuned[up].float(), self._tuned[down].float())
        moments = basis_moments(self.scores, module, weight)
        return factor_pair(weight, module, moments, kept, self.plan.adapters, self._factors)

    def _pair(self, weight: Tensor, module: ModuleScores, kept: Ranges, decision: TensorDecision) -> Stored:
        pair = self._factored(weight, module, kept, decision)
        up, down = stored_tensors(decision.name, decision.shape, decision.rank)
        importance = torch.from_numpy(module.input_moment)
        norm = Norm.of(module, self.scores.second_moments, weight)
        formats = [weight_type(self.plan.format, name or "") for name in (decision.up_type, decision.down_type)]
        if self._round_trip is None or all(form.is_float for form in formats):
            inner = inner_importance(pair.down, norm.inputs)
            return Stored({up: pair.up, down: pair.down}, {down: importance, up: inner})
        inputs = InputMoments(importance, self.feedback.of(module) if down in self.matrices else None)
        fitted = refit(balanced(pair, norm), norm, inputs, formats[0], formats[1], self._round_trip)
        return Stored({up: fitted.pair.up, down: fitted.pair.down}, {down: importance, up: fitted.up_importance})

    def _residual(self, ranked: Tensor, module: ModuleScores, decision: TensorDecision) -> Stored:
        assert decision.rank is not None
        weight = dense_weight(ranked, module, self.plan.adapters).float()
        up, down = stored_tensors(decision.name, decision.shape, decision.rank)
        moment = torch.from_numpy(module.input_moment)
        importance = {decision.name: moment, down: moment}
        norm = Norm.of(module, self.scores.second_moments, ranked)
        whitenings = Whitening.of(norm.inputs), Whitening.of(norm.gradients)
        if self._round_trip is None:
            basis = whitened_components(weight, *whitenings)
            pair = Pair(basis.up[:, : decision.rank], basis.down[: decision.rank])
            importance[up] = inner_importance(pair.down, norm.inputs)
            return Stored({up: pair.up, down: pair.down, decision.name: weight - pair.up @ pair.down}, importance)
        types = (decision.type, decision.up_type, decision.down_type)
        base, *formats = (weight_type(self.plan.format, name or "") for name in types)
        informed = not self.matrices.keys().isdisjoint((decision.name, down))
        inputs = InputMoments(moment, self.feedback.of(module) if informed else None)
        found = correct(
            weight, norm, whitenings, inputs, base, decision.rank, (formats[0], formats[1]), self._round_trip
        )
        importance[up] = found.up_importance
        return Stored({up: found.pair.up, down: found.pair.down, decision.name: found.base}, importance)
