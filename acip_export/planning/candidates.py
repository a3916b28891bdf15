"""Everything that could become of each tensor: representation x rank x type, with exact bytes and predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.plan import TensorDecision
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import UnsupportedError
from acip_export.formats.protocol import ExportFormat, Layout
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import EMBEDDINGS, HEAD, is_embedding
from acip_export.planning.space import SearchSpace
from acip_export.units import ceil_div
from acip_export.weight_types import AllowedTypes, WeightType, undominated, weight_type

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# More ranks than this per layer refine the plan less than the block sizes coarsen it.
_MOST_RANKS = 48

# Which bytes count: of files; of files and what the runtime holds of them; or only of memory that no file backs.
Counted = Literal["files", "memory", "anonymous"]


@dataclass(frozen=True)
class CountedBytes:
    """Bytes of the candidates of one tensor, as a budget counts them; (n,) each.

    Attributes:
        nbytes: what is there for as long as the model is loaded.
        once: what is held once for all tensors, for the one that needs most of it.
        loading: what is held once while loading, for the tensor that needs most of it.
        heap_block: as that of :class:`~acip_export.formats.protocol.TensorMemory`.
    """

    nbytes: IntArray
    once: IntArray
    loading: IntArray
    heap_block: IntArray


@dataclass(frozen=True, eq=False)
class CandidateTable:
    """What could become of every tensor of one shape: decisions without name and kept components."""

    decisions: tuple[TensorDecision, ...]
    _held: dict[tuple[str, Counted, bool, bool], CountedBytes] = field(default_factory=dict, init=False, repr=False)
    _subsets: dict[tuple[int, ...], CandidateTable] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def stored(self) -> IntArray:
        """(n,) stored bytes."""
        return np.array([decision.nbytes for decision in self.decisions], np.int64)

    @cached_property
    def low_rank(self) -> BoolArray:
        """(n,) whether a candidate has a pair of factors."""
        return np.array([decision.rank is not None for decision in self.decisions], np.bool_)

    def held(self, format: ExportFormat, counted: Counted, embedding: bool, tied_head: bool) -> CountedBytes:
        """Return what a runtime of the format holds beside the stored bytes, or in anonymous memory."""
        key = (format.name, counted, embedding, tied_head)
        if key not in self._held:
            of_tensor = format.memory.anonymous if counted == "anonymous" else format.memory.beside
            held = [of_tensor(decision, embedding, tied_head) for decision in self.decisions]
            self._held[key] = CountedBytes(
                nbytes=np.array([tensor.kept for tensor in held], np.int64),
                once=np.array([tensor.once for tensor in held], np.int64),
                loading=np.array([tensor.loading for tensor in held], np.int64),
                heap_block=np.array([tensor.heap_block for tensor in held], np.int64),
            )
        return self._held[key]

    def subset(self, kept: tuple[int, ...]) -> CandidateTable:
        """Return the table of the candidates with these numbers."""
        if kept not in self._subsets:
            self._subsets[kept] = CandidateTable(tuple(self.decisions[i] for i in kept))
        return self._subsets[kept]


@dataclass(frozen=True)
class Candidates:
    """The candidates of one tensor.

    Attributes:
        name: the tensor's.
        table: what they are; tensors of the same shape share it.
        loss: (n,) predicted loss of each.
        module: the scores of the linear layer that the tensor is of, if it was ranked.
        tied_head: the tensor is an embedding that the head reads too.
    """

    name: str
    table: CandidateTable
    loss: FloatArray
    module: ModuleScores | None
    tied_head: bool = False

    @property
    def options(self) -> tuple[TensorDecision, ...]:
        """The decisions, without name and kept components, which :meth:`decision` fills in."""
        return self.table.decisions

    def counted(self, format: ExportFormat, counted: Counted) -> CountedBytes:
        """Return the bytes that count."""
        stored = self.table.stored
        if counted == "files":
            return CountedBytes(stored, *(np.zeros_like(stored) for _ in range(3)))
        held = self.table.held(format, counted, is_embedding(self.name), self.tied_head)
        return held if counted == "anonymous" else replace(held, nbytes=stored + held.nbytes)

    def only(self, allowed: Callable[[Candidates, TensorDecision], bool]) -> Candidates:
        """Return the candidates that ``allowed(self, option)`` lets through."""
        kept = tuple(i for i, option in enumerate(self.options) if allowed(self, option))
        return replace(self, table=self.table.subset(kept), loss=self.loss[list(kept)])

    def decision(self, chosen: int) -> TensorDecision:
        """Return a candidate with the tensor's name and the kept components written down."""
        option = replace(self.options[chosen], name=self.name)
        if option.rank is None or self.module is None or option.representation == "residual":
            return option
        kept = _ranges(np.sort(self.module.order[: option.rank]))
        return replace(option, kept=kept)


def _ranges(components: IntArray) -> tuple[tuple[int, int], ...]:
    """Return sorted numbers as ``[start, stop)`` ranges."""
    breaks = np.flatnonzero(np.diff(components) != 1)
    starts = components[np.r_[0, breaks + 1]]
    stops = components[np.r_[breaks, len(components) - 1]] + 1
    return tuple((int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def build_candidates(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    losses: dict[str, FloatArray],
    space: SearchSpace,
    errors: RoundingErrors,
) -> tuple[Candidates, ...]:
    """Make the candidates of every tensor of the checkpoint, in its order.

    Args:
        losses: the loss of dropping each component, by module.
        errors: what rounding costs, measured on this model; what it lacks is taken from the types' own errors.

    Raises:
        UnsupportedError: no allowed type can hold a tensor's rows.
    """
    layout, types = space.layout, space.allowed
    embedding_types = space.allowed_in_embedding
    # Tables of positions, and an encoder's heads, whose rounding no ranking measures; runtimes add some as they are.
    tables = set(checkpoint.tensors) - set(scores.embedding_sensitivity)
    if checkpoint.shape.generates:
        tables = {name for name in tables if not name.endswith((*EMBEDDINGS, HEAD))}
    built = []
    for name, info in checkpoint.tensors.items():
        module = scores.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is not None:
            built.append(_linear(name, module, losses[name.removesuffix(".weight")], layout, types, errors))
        elif len(info.shape) == 2 and name not in tables:
            sensitivity = scores.embedding_sensitivity.get(name, 0.0)
            embedding = _dense(name, info.shape, sensitivity, embedding_types, None, errors)
            tied = checkpoint.shape.tied_embeddings and is_embedding(name)
            built.append(replace(embedding, tied_head=tied))
        else:
            vector = space.format.type(space.format.vector_type)
            built.append(_dense(name, info.shape, 0.0, AllowedTypes((vector,)), None, errors))
    return tuple(built)


def pair_types(types: AllowedTypes, columns: Iterable[int]) -> tuple[tuple[str, str], ...]:
    """Return every combination of types of (down, up) that a candidate may have in layers with rows of these lengths.

    Those of floats alone are left out: they do not round.
    """
    ranks = range(32, 257, 32)  # every remainder that a block size can leave
    downs = {down: None for width in columns for down in types.of_row(width)}
    pairs = {(down.name, up.name): None for down in downs for rank in ranks for up in _partners(down, types, rank)}
    floats = {t.name for t in types if t.is_float}
    return tuple(pair for pair in pairs if not set(pair) <= floats)


def residual_bases(layout: Layout, types: AllowedTypes, columns: Iterable[int]) -> tuple[str, ...]:
    """Return the types of the bases whose low-rank correction is a candidate in layers with rows of these lengths."""
    if not {t.name for t in types} & {name for name, _ in layout.residual_pairs}:
        return ()
    return tuple({t.name: None for width in columns for t in types.of_row(width) if not t.is_float})


def _dense(
    name: str,
    shape: tuple[int, ...],
    sensitivity: float,
    types: AllowedTypes,
    module: ModuleScores | None,
    errors: RoundingErrors,
) -> Candidates:
    """Make the candidates of a tensor that is one matrix."""
    fitting = types.of_row(shape[-1])
    if not fitting:
        names = ", ".join(f"{t.name} (blocks of {t.block})" for t in types)
        raise UnsupportedError(
            f"{name}: rows of {shape[-1]} weights fit none of the allowed types: {names}.\nAllow another with  --types"
        )
    loss = np.array(
        [
            errors.dense_loss(name, t.name, sensitivity * t.relative_mse) + errors.input_loss(name, t.name)
            for t in fitting
        ]
    )
    return Candidates(name, _dense_table(shape, types), loss, module)


@lru_cache(maxsize=256)
def _dense_table(shape: tuple[int, ...], types: AllowedTypes) -> CandidateTable:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return CandidateTable(
        tuple(TensorDecision("", shape, "dense", t.nbytes(rows, columns), type=t.name) for t in types.of_row(columns))
    )


def _linear(
    name: str,
    module: ModuleScores,
    losses: FloatArray,
    layout: Layout,
    types: AllowedTypes,
    errors: RoundingErrors,
) -> Candidates:
    """Make the candidates of a ranked layer: dense, and what the layout has of pairs and corrected bases."""
    dense = _dense(name, module.shape, module.sensitivity, types, module, errors)
    if layout.low_rank is None:
        return dense
    shared, layer = _linear_table(module.shape, len(losses), layout, types), name.removesuffix(".weight")
    dropped = np.r_[np.cumsum(losses[module.order][::-1])[::-1], 0.0]
    up_rounding = np.cumsum(module.up_sensitivity[module.order], dtype=np.float64)
    down_rounding = np.cumsum(module.down_sensitivity[module.order], dtype=np.float64)
    pairs = shared.up_mse * up_rounding[shared.rank - 1] + shared.down_mse * down_rounding[shared.rank - 1]
    for group in shared.pairs:
        ratios = errors.pair_ratios(layer, group.down, group.up, shared.rank[group.numbers] / len(losses))
        pairs[group.numbers] *= ratios
        pairs[group.numbers] += errors.input_loss(name, group.down)
    corrections: list[float] = []
    unmeasured: list[int] = []
    first = len(shared.table.decisions) - len(shared.corrections)
    for number, correction in enumerate(shared.corrections, first):
        ratio = errors.residual_ratio(layer, correction.type, correction.rank / len(losses))
        if ratio is None:
            unmeasured.append(number)
        else:
            of_inputs = errors.input_loss(name, correction.type)
            corrections.append((dense.loss[correction.base] - of_inputs) * ratio + of_inputs)
    table = shared.table
    if unmeasured:
        table = table.subset(tuple(i for i in range(len(table.decisions)) if i not in unmeasured))
    return Candidates(name, table, np.r_[dense.loss, dropped[shared.rank] + pairs, corrections], module)


@dataclass(frozen=True)
class _PairTypes:
    """The pairs of one combination of types: their ``numbers`` among all pairs."""

    down: str
    up: str
    numbers: IntArray


@dataclass(frozen=True)
class _Correction:
    """A low-rank correction of a base: the number of the dense candidate that is the base, and its type."""

    base: int
    type: str
    rank: int


@dataclass(frozen=True, eq=False)
class _LinearTable:
    """What the candidates of all linear layers of one shape share.

    Attributes:
        table: dense matrices, then pairs, then corrected bases.
        rank: (pairs,) the rank of each pair.
        up_mse, down_mse: (pairs,) relative errors of each pair's types.
        pairs: which pairs are of which types.
        corrections: one for each corrected base.
    """

    table: CandidateTable
    rank: IntArray
    up_mse: FloatArray
    down_mse: FloatArray
    pairs: tuple[_PairTypes, ...]
    corrections: tuple[_Correction, ...]


@lru_cache(maxsize=256)
def _linear_table(shape: tuple[int, ...], components: int, layout: Layout, types: AllowedTypes) -> _LinearTable:
    rows, columns = shape
    dense = _dense_table(shape, types).decisions
    largest = max(option.nbytes for option in dense)
    base = None if layout.base_type is None else weight_type(types.types[0].format, layout.base_type)
    fits = base is None or base.fits(columns)
    base_bytes = base.nbytes(rows, columns) if base is not None and fits else 0
    pairs: list[TensorDecision] = []
    up_mse: list[float] = []
    down_mse: list[float] = []
    for rank in _ranks(components, layout.rank_multiple) if fits else ():
        for down in types.of_row(columns):
            for up in _partners(down, types, rank):
                nbytes = base_bytes + up.nbytes(rows, rank) + down.nbytes(rank, columns)
                if nbytes >= largest:
                    continue
                pairs.append(
                    TensorDecision(
                        "",
                        shape,
                        layout.low_rank or "factored",
                        nbytes,
                        type=layout.base_type,
                        rank=rank,
                        up_type=up.name,
                        down_type=down.name,
                    )
                )
                up_mse.append(up.relative_mse)
                down_mse.append(down.relative_mse)
    by_types: dict[tuple[str, str], list[int]] = {}
    for number, pair in enumerate(pairs):
        by_types.setdefault((str(pair.down_type), str(pair.up_type)), []).append(number)
    corrected: list[TensorDecision] = []
    corrections: list[_Correction] = []
    for number, option in enumerate(dense) if fits else ():
        for decision in _corrected(option, components, layout, types):
            if decision.nbytes < largest:
                corrected.append(decision)
                corrections.append(_Correction(number, str(decision.type), decision.rank or 0))
    return _LinearTable(
        CandidateTable((*dense, *pairs, *corrected)),
        np.array([pair.rank for pair in pairs], np.int64),
        np.array(up_mse, np.float64),
        np.array(down_mse, np.float64),
        tuple(_PairTypes(down, up, np.array(numbers)) for (down, up), numbers in by_types.items()),
        tuple(corrections),
    )


def _corrected(base: TensorDecision, components: int, layout: Layout, types: AllowedTypes) -> Iterator[TensorDecision]:
    """Yield ``base`` with each low-rank correction that the layout has and that pays."""
    rows, columns = base.shape
    allowed = {t.name: t for t in types}
    for name, rank in layout.residual_pairs:
        pair = allowed.get(name)
        if pair is None or not (pair.fits(columns) and pair.fits(rank)) or 2 * rank > components:
            continue
        nbytes = base.nbytes + pair.nbytes(rows, rank) + pair.nbytes(rank, columns)
        yield replace(base, representation="residual", nbytes=nbytes, rank=rank, up_type=name, down_type=name)


def _ranks(components: int, multiple: int) -> list[int]:
    """Return multiples of ``multiple``, evenly thinned where a wide layer has very many."""
    step = multiple * max(1, ceil_div(components, multiple * _MOST_RANKS))
    return list(range(step, components, step))


def _partners(down: WeightType, types: AllowedTypes, rank: int) -> list[WeightType]:
    """Return the types for ``up`` worth pairing with ``down``: its own where the rank fits its block, else the two
    closest."""
    if down.fits(rank):
        return [down]
    fitting = undominated(types.of_row(rank))
    return sorted(fitting, key=lambda t: abs(t.bits_per_weight - down.bits_per_weight))[:2]
