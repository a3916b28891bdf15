"""The tensors of a plan without a bundle: made from checkpoint and score file when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from acip_export.artifacts.materialized import MaterializedModel, check_context, stored_of
from acip_export.artifacts.plan import Plan, TensorDecision, numbers_sha256
from acip_export.artifacts.scores import ScoreFile, check_weights
from acip_export.artifacts.tuned import Tuned
from acip_export.errors import CheckpointError, PlanFileError
from acip_export.io.kept_states import tensors_sha256
from acip_export.io.scratch import ArrayStore, Scratch
from acip_export.lowrank.cache import FactorCache
from acip_export.materialization.plan_numbers import PlanNumbers
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.error_feedback import FeedbackFactor
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.rounding.quantizer import RoundTrip

_IMPORTANCE = "importance of "


class PlannedModel(MaterializedModel):
    """Has the very numbers that a bundle of the plan has, one tensor at a time.

    A dense tensor is read from the checkpoint whenever it is asked for, and its channels are scaled then. Threads may
    share it.

    Args:
        round_trip, feedback_types: as :class:`~acip_export.materialization.plan_numbers.PlanNumbers`.
        cache: directory of factors (:mod:`acip_export.lowrank.cache`), read and filled.
        scratch: keeps what takes long to make, the parts of pairs and those factors of error feedback that the user's
            cache does not, unless ``kept`` does; ``None``: they are made whenever they are asked for.
        tuned: what tuning made of the plan's scales, vectors and pairs, where it asks for that.

    Attributes:
        checkpoint, scores, tuned: as they came.
        numbers: makes them.

    Raises:
        ScoreFileError, PlanFileError: they do not belong to this model.
        CheckpointError: a weight is damaged or not finite.
    """

    ERROR = CheckpointError

    def __init__(
        self,
        checkpoint: Checkpoint,
        scores: ScoreFile,
        plan: Plan,
        round_trip: RoundTrip | None = None,
        cache: Path | None = None,
        feedback_types: Collection[str] = (),
        scratch: Scratch | None = None,
        kept: KeptRoundings | None = None,
        tuned: Tuned | None = None,
    ) -> None:
        super().__init__(checkpoint.path, plan, checkpoint.config, kept)
        self.tuned = tuned
        self._gains = {} if tuned is None else tuned.gains
        self._vectors = {} if tuned is None else tuned.vectors
        scores.check_model(checkpoint)
        check_plan(checkpoint, plan)
        check_weights(scores, checkpoint)
        self.checkpoint, self.scores = checkpoint, scores
        self._lock = Lock()
        factors = {} if tuned is None else tuned.factors
        # Of the names of kept parts: tuning for so long comes out otherwise each time.
        self._tuned_to = f"{tensors_sha256(factors)} " if factors else ""
        self._store: ArrayStore | None = scratch if kept is None else kept.parts(numbers_sha256(plan))
        self.numbers = PlanNumbers(
            checkpoint,
            scores,
            plan,
            round_trip,
            FactorCache(cache),
            feedback_types,
            store=self._store,
            tuned_factors=factors,
        )
        stored = {decision: stored_of(decision) for decision in plan.tensors}
        self._shapes = {name: shape for shapes in stored.values() for name, shape in shapes.items()}
        self._decisions = {name: decision for decision, shapes in stored.items() for name in shapes}

    @property
    def notes(self) -> tuple[str, ...]:
        """See :class:`MaterializedModel`."""
        return () if self.tuned is None else (str(self.tuned.result),)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See :class:`MaterializedModel`."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """See :class:`MaterializedModel`; raises as :meth:`PlanNumbers.make`."""
        if name in self._vectors:
            return self._vectors[name]
        decision = self._decisions[name]
        if decision.rank is None or self._store is None:
            return self.numbers.make(decision).numbers[name].contiguous()
        return self._kept_part(self._store, decision, name)

    def has_importance(self, name: str) -> bool:
        """See :class:`MaterializedModel`."""
        decision = self._decisions[name]
        return decision.rank is not None or self.numbers.dense_importance(decision) is not None

    def importance(self, name: str) -> Tensor | None:
        """See :class:`MaterializedModel`."""
        decision = self._decisions[name]
        if decision.rank is None:
            return self.numbers.dense_importance(decision)
        if self._store is None:
            return self.numbers.make(decision).importance[name]
        return self._kept_part(self._store, decision, _IMPORTANCE + name)

    def feedback(self, name: str) -> FeedbackFactor | None:
        """See :class:`MaterializedModel`; raises ScoreFileError for moments that have no factor."""
        key = self.numbers.matrices.get(name)
        if key is None:
            return None
        with self._timed():
            return self.numbers.feedback.fitting(key, name, self._shapes[name][-1])

    def row_feedback(self, name: str) -> Sequence[FeedbackFactor] | None:
        """See :class:`MaterializedModel`; raises as :meth:`feedback`."""
        key = self.numbers.rows.get(name)
        if key is None:
            return None
        with self._timed():
            return self.numbers.feedback.of_rows(key)

    def gains(self, name: str) -> Tensor | None:
        """See :class:`MaterializedModel`."""
        return self._gains.get(name)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.kept is None else self.kept.timed()

    def _kept_part(self, store: ArrayStore, decision: TensorDecision, name: str) -> Tensor:
        """Read a part of a pair, of which all are made for the first that is asked for."""
        with self._lock:
            if self._tuned_to + name not in store:
                with self._timed():
                    made = self.numbers.make(decision)
                for part, tensor in made.numbers.items():
                    store.write(self._tuned_to + part, tensor.numpy())
                for part, tensor in made.importance.items():
                    store.write(self._tuned_to + _IMPORTANCE + part, tensor.numpy())
            return torch.from_numpy(store.read(self._tuned_to + name))


def check_plan(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises PlanFileError unless the plan decides every tensor of this model, in its shape."""
    if plan.model_fingerprint != checkpoint.fingerprint:
        raise PlanFileError(f"the plan was made for {plan.model!r}, not for {checkpoint.path}; plan again")
    decided = {decision.name: decision.shape for decision in plan.tensors}
    expected = {name: info.shape for name, info in checkpoint.tensors.items()}
    if decided != expected:
        different = sorted(n for n in decided.keys() | expected.keys() if decided.get(n) != expected.get(n))
        raise PlanFileError(f"the plan does not fit {checkpoint.path}: {different[0]} differs; plan again")
    check_context(plan, checkpoint)
