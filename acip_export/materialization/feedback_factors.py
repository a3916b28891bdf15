"""Factors for error feedback: made of a score file's second moments, one for every input, and written to the bundle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from acip_export.artifacts.bundle import FEEDBACK_PARTS
from acip_export.artifacts.materialized import MaterializedModel, stored_formats, stored_of
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import ScoreFileError
from acip_export.io.atomic import SafetensorsWriter
from acip_export.io.scratch import ArrayStore
from acip_export.lowrank.feedback_cache import FeedbackCache
from acip_export.lowrank.moments import moment_name
from acip_export.rounding.error_feedback import FeedbackFactor

# Layers that share an input are near each other: the factors of these many inputs are kept.
_KEPT = 4


class FeedbackFactors:
    """Makes the factor of an input when it is asked for, and keeps the last few. Threads may share it.

    Those of wide inputs are in the user's cache (:mod:`acip_export.lowrank.feedback_cache`).

    Args:
        store: keeps those that the user's cache does not: it may have no room, and of a large model too little.
    """

    def __init__(self, scores: ScoreFile, store: ArrayStore | None = None) -> None:
        self._scores, self._store, self._cache = scores, store, FeedbackCache()
        self._kept: OrderedDict[str, FeedbackFactor] = OrderedDict()
        self._lock = Lock()

    def of(self, module: ModuleScores) -> FeedbackFactor | None:
        """Return the factor of a module's input; ``None`` where only the moment's diagonal is known.

        Raises:
            ScoreFileError: see :meth:`by_key`.
        """
        return self.by_key(module.input_key) if module.input_key else None

    def by_key(self, key: str) -> FeedbackFactor:
        """Return the factor of a second moment.

        Raises:
            ScoreFileError: it overflows.
        """
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._factor(key)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def fitting(self, key: str, name: str, columns: int) -> FeedbackFactor:
        """Return the factor of a second moment for a matrix; raises ScoreFileError where it is of another size."""
        factor = self.by_key(key)
        if factor.size != columns:
            raise ScoreFileError(f"{moment_name(key)} is of {factor.size} columns, {name} has {columns}; rank again")
        return factor

    def _factor(self, key: str) -> FeedbackFactor:
        names, moment = [f"{key}/{part}" for part in FEEDBACK_PARTS], self._scores.moment(key)
        if self._store is not None and all(name in self._store for name in names):
            return FeedbackFactor(*map(self._store.read, names))
        factor = self._cache.read(moment)
        if factor is not None:
            return factor
        factor = moment.feedback_factor(moment_name(key))
        if not self._cache.write(moment, factor) and self._store is not None:
            for name, part in zip(names, FEEDBACK_PARTS, strict=True):
                self._store.write(name, getattr(factor, part))
        return factor


def matrices_with_feedback(plan: Plan, scores: ScoreFile, feedback_types: Collection[str]) -> dict[str, str]:
    """Return the key of the input of every stored matrix that is to be rounded with error feedback.

    The factor ``up`` of a pair has inputs of its own, whose moment nobody has.

    Raises:
        ScoreFileError: the plan asks for error feedback, and the score file has no second moments.
    """
    if plan.rounding != "feedback":
        return {}
    found: dict[str, str] = {}
    wanted = 0
    for decision in plan.tensors:
        key = scores.moment_key(decision.name)
        for name, form in stored_formats(decision).items():
            if form in feedback_types and name != f"{decision.module}.up.weight":
                wanted += decision.module in scores.modules
                if key:
                    found[name] = key
    if wanted and not found:
        raise ScoreFileError(
            "the plan rounds with error feedback, which needs second moments of the inputs, and the score file has "
            "none; plan again with  --rounding nearest,  or rank with an algorithm that measures them"
        )
    return found


class FeedbackWriter:
    """Writes the factors that ``matrices`` name, each once; no file where there are none.

    Attributes:
        sha256: of the file, when all is written; ``None``: there is no file.
    """

    def __init__(self, file: Path, plan: Plan, matrices: Mapping[str, str]) -> None:
        self._matrices = matrices
        self._pending: dict[str, None] = dict.fromkeys(matrices.values())
        self._writer: SafetensorsWriter | None = None
        if not matrices:
            return
        stored = {name: shape for decision in plan.tensors for name, shape in stored_of(decision).items()}
        sizes = {key: stored[name][1] for name, key in matrices.items()}
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key in self._pending:
            size = sizes[key]
            shapes = (("I32", (size,)), ("I8", (size * (size - 1) // 2,)), ("F32", (size,)))
            declared |= {f"{key}/{part}": shape for part, shape in zip(FEEDBACK_PARTS, shapes, strict=True)}
        self._writer = SafetensorsWriter(file, declared, {})

    @property
    def sha256(self) -> str | None:
        return None if self._writer is None else self._writer.sha256

    def write(self, decision: TensorDecision, model: MaterializedModel) -> None:
        """Write the factor of a decision's input, if it is the first that needs it.

        Raises:
            ScoreFileError: it is of another size.
        """
        name = next((name for name in stored_formats(decision) if name in self._matrices), None)
        if name is None or self._matrices[name] not in self._pending:
            return
        key, factor = self._matrices[name], model.feedback(name)
        assert self._writer is not None and factor is not None
        del self._pending[key]
        for part in FEEDBACK_PARTS:
            self._writer.write(f"{key}/{part}", getattr(factor, part).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, value, traceback)
