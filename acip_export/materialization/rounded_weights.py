"""Make the numbers that an export of a plan computes with, one tensor at a time and without files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType

from torch import Tensor

from acip_export.artifacts.materialized import stored_formats
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.scores import ScoreFile
from acip_export.lowrank.cache import FactorCache
from acip_export.materialization.channel_scales import scale_channels
from acip_export.materialization.factors import Pair
from acip_export.materialization.feedback_factors import FeedbackFactors
from acip_export.materialization.plan_numbers import PlanNumbers
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.rounding.quantizer import InputMoments, RoundTrip
from acip_export.weight_types import weight_type

# Numbers of tensors that are kept for other plans, in those of a block.
_BLOCKS_KEPT = 1.5


class RoundedWeights:
    """What plans of one model and format have in common: what rounding knows about inputs, and tensors made twice.

    Args:
        kept: matrices that an export of the same plan has rounded, or will read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scores: ScoreFile,
        round_trip: RoundTrip,
        feedback_types: Collection[str] = (),
        cache: FactorCache | None = None,
        kept: KeptRoundings | None = None,
    ) -> None:
        self.checkpoint, self.scores, self.round_trip = checkpoint, scores, round_trip
        self.feedback_types, self.rounded_before = feedback_types, kept
        self.factors = cache or FactorCache(None)
        # Of all inputs, scaled or not: keys tell them apart.
        self.feedback = FeedbackFactors(scale_channels(checkpoint, scores)[1] if feedback_types else scores)
        self._made: OrderedDict[object, Tensor] = OrderedDict()
        self._asked: Sequence[str] = ()

    def of(self, plan: Plan, inputs: bool = True, factors: Mapping[str, Tensor] = MappingProxyType({})) -> RoundedPlan:
        """Return the numbers of one plan.

        Args:
            inputs: whether what matrices are multiplied with is rounded too, as runtimes do on processors.
            factors: of pairs that were tuned.
        """
        return RoundedPlan(self, plan, inputs, factors)

    def made(self, names: Sequence[str], key: object, make: Callable[[], Tensor]) -> Tensor:
        """Make a tensor of a block, or return what another plan had made.

        As many numbers are kept as the block has, half as many again, and of the last block that was asked for.

        Args:
            names: all tensors of the block. key: equal for equal numbers.
        """
        if names is not self._asked:
            self._made, self._asked = OrderedDict(), names
        if key not in self._made:
            self._made[key] = make()
        self._made.move_to_end(key)
        most = _BLOCKS_KEPT * sum(prod(self.checkpoint.tensors[name].shape) for name in names)
        while sum(tensor.numel() for tensor in self._made.values()) > most and len(self._made) > 1:
            self._made.popitem(last=False)
        return self._made[key]


@dataclass(frozen=True)
class RoundedRows:
    """A matrix of a plan that is made some rows at a time.

    Attributes:
        made_as: equal for equal numbers. read: makes rows, float32.
    """

    made_as: Hashable
    read: Callable[[Tensor | slice], Tensor]


class RoundedPlan:
    """A plan's weights as its runtime has them: rounded, pairs multiplied out, float32.

    Types of floats count as exact: what they hold is left out, unless its channels are scaled.
    """

    def __init__(self, shared: RoundedWeights, plan: Plan, inputs: bool, factors: Mapping[str, Tensor]) -> None:
        self._shared, self.plan, self._inputs = shared, plan, inputs
        self._numbers = PlanNumbers(
            shared.checkpoint,
            shared.scores,
            plan,
            shared.round_trip,
            shared.factors,
            shared.feedback_types,
            shared.feedback,
            tuned_factors=factors,
        )
        # Tells numbers apart that are made of tuned factors.
        self._tuned = id(self) if factors else None
        self._decisions = {decision.name: decision for decision in plan.tensors}

    def tensors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return those of the named tensors that differ from the dense model's."""
        found = {}
        for name in names:
            decision = self._changed(name)
            if decision is None:
                continue
            key = (decision, self._numbers.scaled_sides(name), self.plan.adapters, self._tuned)
            found[name] = self._shared.made(names, key, partial(self._tensor, decision))
        return found

    def pair(self, decision: TensorDecision) -> Pair:
        """Return a pair before it is rounded, see :meth:`PlanNumbers.pair`."""
        return self._numbers.pair(decision)

    def rows(self, name: str) -> RoundedRows | None:
        """Return a matrix that is too large to be made whole, if it differs from the dense model's."""
        decision = self._changed(name)
        if decision is None:
            return None
        return RoundedRows((decision, self.plan.adapters, self._tuned), partial(self._tensor, decision))

    def input_blocks(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the blocks in which what the named matrices are multiplied with is rounded; of pairs, ``down``'s."""
        found = {}
        for name in names if self._inputs else ():
            decision = self._decisions.get(name)
            read = None if decision is None else decision.type if decision.rank is None else decision.down_type
            if read is not None and (block := weight_type(self.plan.format, read).input_block):
                found[name] = block
        return found

    def _changed(self, name: str) -> TensorDecision | None:
        """Return the decision on a tensor that differs from the dense model's; ``None``: it is the same."""
        decision = self._decisions.get(name)
        if decision is None or decision.rank is not None or any(self._numbers.scaled_sides(name)):
            return decision
        return None if weight_type(self.plan.format, decision.type or "").is_float else decision

    def _tensor(self, decision: TensorDecision, rows: Tensor | slice | None = None) -> Tensor:
        """Make a tensor, or some rows of it; a pair's are cut out of the whole."""
        shared = self._shared
        stored = self._numbers.make(decision)
        numbers = stored.numbers
        of_whole = None if decision.rank is not None else rows
        for name, form in stored_formats(decision).items():
            numbers[name] = (numbers[name] if of_whole is None else numbers[name][of_whole]).float()
            if numbers[name].ndim == 2:
                key, of_rows = self._numbers.matrices.get(name), self._numbers.rows.get(name)
                inputs = InputMoments(
                    stored.importance.get(name),
                    None if key is None else shared.feedback.by_key(key),
                    shared.rounded_before,
                    row_feedback=None if of_rows is None else shared.feedback.of_rows(of_rows),
                )
                numbers[name] = shared.round_trip(numbers[name], form, inputs)
        if decision.rank is None:
            return numbers[decision.name]
        pair = numbers[f"{decision.module}.up.weight"] @ numbers[f"{decision.module}.down.weight"]
        base = numbers.get(decision.name)
        whole = pair if base is None else pair + base
        return whole if rows is None else whole[rows]
