"""Factors for error feedback: made of a score file's second moments, for every input and every matrix's rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Generic, Self, TypeVar

from acip_export.artifacts.bundle import FEEDBACK_PARTS, row_keys
from acip_export.artifacts.materialized import MaterializedModel, stored_formats, stored_of
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import ScoreFileError
from acip_export.io.atomic import SafetensorsWriter
from acip_export.io.scratch import ArrayStore
from acip_export.lowrank.feedback_cache import FeedbackCache
from acip_export.lowrank.moments import PackedMoment, is_projected, moment_name
from acip_export.model.tensor_names import block_of
from acip_export.rounding.error_feedback import FeedbackFactor

# Layers that share an input are near each other: the factors of these many inputs are kept.
_INPUTS_KEPT = 4
# Of so many matrices those of rows: plans that are measured together round each matrix of a block in several types.
_MATRICES_KEPT = 8

_Made = TypeVar("_Made")


class _Latest(Generic[_Made]):
    """Keeps what was made last. Threads may share it."""

    def __init__(self, most: int) -> None:
        self._most, self._made, self._lock = most, OrderedDict[str, _Made](), Lock()

    def get(self, key: str, make: Callable[[], _Made]) -> _Made:
        """Return what is kept under a key, made for the first to ask."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            self._made.move_to_end(key)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
            return self._made[key]


class FeedbackFactors:
    """Makes a factor when it is asked for, and keeps the last few. Threads may share it.

    Wide ones are in the user's cache (:mod:`acip_export.lowrank.feedback_cache`).

    Args:
        store: keeps those that the user's cache does not: it may have no room, and of a large model too little.
    """

    def __init__(self, scores: ScoreFile, store: ArrayStore | None = None) -> None:
        self._scores, self._store, self._cache = scores, store, FeedbackCache()
        self._inputs, self._rows = _Latest[FeedbackFactor](_INPUTS_KEPT), _Latest[list[FeedbackFactor]](_MATRICES_KEPT)

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
        return self._inputs.get(key, lambda: self._of_input(key))

    def fitting(self, key: str, name: str, columns: int) -> FeedbackFactor:
        """Return the factor of a second moment for a matrix; raises ScoreFileError where it is of another size."""
        factor = self.by_key(key)
        if factor.size != columns:
            raise ScoreFileError(f"{moment_name(key)} is of {factor.size} columns, {name} has {columns}; rank again")
        return factor

    def of_rows(self, key: str) -> Sequence[FeedbackFactor]:
        """Return how errors are carried among rows whose outputs' gradients have a second moment, some rows in each.

        Raises:
            ScoreFileError: it overflows.
        """
        return self._rows.get(key, lambda: self._of_rows(key))

    def _of_input(self, key: str) -> FeedbackFactor:
        moment = self._scores.moment(key)
        return self._made_once(moment, {key: moment.size}, lambda: [moment.feedback_factor(moment_name(key))])[0]

    def _of_rows(self, key: str) -> list[FeedbackFactor]:
        moment = self._scores.second_moments[key]
        keys = row_keys(key, moment.size)
        return self._made_once(
            moment, keys, lambda: moment.row_factors([*keys.values()], moment_name(key)), of_rows=True
        )

    def _made_once(
        self,
        moment: PackedMoment,
        sizes: Mapping[str, int],
        make: Callable[[], list[FeedbackFactor]],
        of_rows: bool = False,
    ) -> list[FeedbackFactor]:
        """Return a moment's factors by their keys and sizes: those that are kept, or all of them made and kept."""
        digest = moment.digest
        # An input's factor has no other part: whoever measures types looks for its moment alone.
        origins = {key: digest + (f"rows {part}".encode() if of_rows else b"") for part, key in enumerate(sizes)}
        known = {key: self._read(key, origins[key], size) for key, size in sizes.items()}
        found = [factor for factor in known.values() if factor is not None]
        if len(found) == len(sizes):
            return found
        factors = make()
        for key, factor in zip(sizes, factors, strict=True):
            if known[key] is None:
                self._keep(key, origins[key], factor)
        return factors

    def _read(self, key: str, origin: bytes, size: int) -> FeedbackFactor | None:
        names = [f"{key}/{part}" for part in FEEDBACK_PARTS]
        if self._store is not None and all(name in self._store for name in names):
            return FeedbackFactor(*map(self._store.read, names))
        return self._cache.read(origin, size)

    def _keep(self, key: str, origin: bytes, factor: FeedbackFactor) -> None:
        if not self._cache.write(origin, factor) and self._store is not None:
            for part in FEEDBACK_PARTS:
                self._store.write(f"{key}/{part}", getattr(factor, part))


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


def rows_with_feedback(plan: Plan, scores: ScoreFile, matrices: Mapping[str, str]) -> dict[str, str]:
    """Return the key of the output gradients of every matrix whose rows make up for each other's errors.

    They are those of layers that stay whole and have a moment of their own, with no more rows than columns: of others
    score files know how gradients meet the columns of the weight. Measured on a real model, that gains nothing here.

    Args:
        matrices: that are rounded with error feedback, see :func:`matrices_with_feedback`.
    """
    found = {}
    for decision in plan.tensors:
        module = scores.modules.get(decision.module)
        if module is None or decision.rank is not None or decision.name not in matrices or not block_of(decision.name):
            continue
        if module.gradient_key and not is_projected(module.shape):
            found[decision.name] = module.gradient_key
    return found


class FeedbackWriter:
    """Writes the factors of inputs that ``matrices`` name, each once, and of rows; no file where there are none.

    Attributes:
        sha256: of the file, when all is written; ``None``: there is no file.
    """

    def __init__(self, file: Path, plan: Plan, matrices: Mapping[str, str], rows: Mapping[str, str]) -> None:
        self._matrices, self._rows = matrices, rows
        self._written: set[str] = set()
        self._writer: SafetensorsWriter | None = None
        if not matrices:
            return
        sizes: dict[str, int] = {}
        for decision in plan.tensors:
            for name, shape in stored_of(decision).items():
                sizes |= {matrices[name]: shape[1]} if name in matrices else {}
                sizes |= row_keys(rows[name], shape[0]) if name in rows else {}
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, size in sizes.items():
            shapes = (("I32", (size,)), ("I8", (size * (size - 1) // 2,)), ("F32", (size,)))
            declared |= {f"{key}/{part}": shape for part, shape in zip(FEEDBACK_PARTS, shapes, strict=True)}
        self._writer = SafetensorsWriter(file, declared, {})

    @property
    def sha256(self) -> str | None:
        return None if self._writer is None else self._writer.sha256

    def write(self, decision: TensorDecision, model: MaterializedModel) -> None:
        """Write the factor of a decision's input, if it is the first that needs it, and those of its rows.

        Raises:
            ScoreFileError: it is of another size.
        """
        for name, shape in stored_of(decision).items():
            key = self._matrices.get(name)
            if key is not None and key not in self._written:
                self._write(key, model.feedback(name))
            if name in self._rows:
                keys, factors = row_keys(self._rows[name], shape[0]), model.row_feedback(name)
                for row_key, factor in zip(keys, factors or (), strict=True):
                    if row_key not in self._written:
                        self._write(row_key, factor)

    def _write(self, key: str, factor: FeedbackFactor | None) -> None:
        assert self._writer is not None and factor is not None
        self._written.add(key)
        for part in FEEDBACK_PARTS:
            self._writer.write(f"{key}/{part}", getattr(factor, part).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, value, traceback)
