"""Everything that could become of each tensor: representation x rank x format, with exact bytes and predicted loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.plan import TensorDecision
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import UnsupportedError
from acip_export.formats.protocol import ExportFormat, Layout
from acip_export.model.architectures import EMBEDDINGS, HEAD
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.memory import is_embedding
from acip_export.weight_types import WeightType, weight_type

IntArray = npt.NDArray[np.int64]

# More ranks than this per layer refine the plan less than the block sizes coarsen it.
_MOST_RANKS = 48


@dataclass(frozen=True, eq=False)
class Options:
    """What could become of every tensor of one shape: decisions without name and kept units."""

    decisions: tuple[TensorDecision, ...]
    _held: dict[tuple[str, bool, bool], tuple[IntArray, IntArray, IntArray]] = field(default_factory=dict, repr=False)
    _subsets: dict[tuple[int, ...], Options] = field(default_factory=dict, repr=False)

    @cached_property
    def nbytes(self) -> IntArray:
        """(n,) stored bytes."""
        return np.array([option.nbytes for option in self.decisions], np.int64)

    @cached_property
    def low_rank(self) -> npt.NDArray[np.bool_]:
        """(n,)"""
        return np.array([option.rank is not None for option in self.decisions], np.bool_)

    def beside(self, target: ExportFormat, embedding: bool, tied_head: bool) -> tuple[IntArray, IntArray, IntArray]:
        """Return (n,) each of :class:`acip_export.formats.protocol.TensorMemory`: kept, once and loading."""
        key = (target.name, embedding, tied_head)
        if key not in self._held:
            held = [astuple(target.memory.beside(option, embedding, tied_head)) for option in self.decisions]
            kept, once, loading = np.array(held, np.int64).reshape(-1, 3).T
            self._held[key] = (kept, once, loading)
        return self._held[key]

    def subset(self, kept: tuple[int, ...]) -> Options:
        if kept not in self._subsets:
            self._subsets[kept] = Options(tuple(self.decisions[i] for i in kept))
        return self._subsets[kept]


@dataclass(frozen=True)
class Candidates:
    """The candidates of one tensor.

    Attributes:
        name: of the tensor.
        table: what they are; tensors of the same shape share it.
        loss: (n,) predicted loss of each.
        tied_head: the tensor is an embedding that the head reads too.
    """

    name: str
    table: Options
    loss: npt.NDArray[np.float64]
    module: ModuleScores | None
    tied_head: bool = False

    @property
    def options(self) -> tuple[TensorDecision, ...]:
        """Without name and kept units, which :meth:`decision` fills in."""
        return self.table.decisions

    def nbytes(self, target: ExportFormat, scope: str) -> IntArray:
        """(n,) stored bytes, and in memory what the runtime keeps beside them for as long as it runs."""
        return self.table.nbytes if scope == "file" else self.table.nbytes + self._beside(target)[0]

    def peaks(self, target: ExportFormat, scope: str) -> tuple[IntArray, IntArray]:
        """(n,) what is held once, for the largest matrix, and (n,) once while loading."""
        _, once, loading = self._beside(target)
        return (np.zeros_like(once), np.zeros_like(loading)) if scope == "file" else (once, loading)

    def _beside(self, target: ExportFormat) -> tuple[IntArray, IntArray, IntArray]:
        return self.table.beside(target, is_embedding(self.name), self.tied_head)

    def only(self, allowed: Callable[[Candidates, TensorDecision], bool]) -> Candidates:
        """The candidates that ``allowed(self, option)`` lets through."""
        kept = tuple(i for i, option in enumerate(self.options) if allowed(self, option))
        return replace(self, table=self.table.subset(kept), loss=self.loss[list(kept)])

    def decision(self, chosen: int) -> TensorDecision:
        """The option with the tensor's name and the kept units written down."""
        option = replace(self.options[chosen], name=self.name)
        if option.rank is None or self.module is None or option.representation == "residual":
            return option
        kept = _ranges(np.sort(self.module.order[: option.rank]))
        return replace(option, kept=kept)


def _ranges(units: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    breaks = np.flatnonzero(np.diff(units) != 1)
    starts = units[np.r_[0, breaks + 1]]
    stops = units[np.r_[breaks, len(units) - 1]] + 1
    return tuple((int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def build_candidates(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    losses: dict[str, npt.NDArray[np.float64]],
    target: ExportFormat,
    layout: Layout,
    types: tuple[WeightType, ...],
    errors: RoundingErrors,
) -> tuple[Candidates, ...]:
    """One entry per tensor of the checkpoint, in its order.

    Args:
        losses: of dropping each component. errors: measured on this model; where they are silent, the table of formats
            speaks.

    Raises:
        UnsupportedError: no allowed format can hold a tensor's rows.
    """
    embedding_types = choose_embedding_types(target, types)
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
            vector = target.type(target.vector_type)
            built.append(_dense(name, info.shape, 0.0, (vector,), None, errors))
    return tuple(built)


def choose_embedding_types(target: ExportFormat, types: tuple[WeightType, ...]) -> tuple[WeightType, ...]:
    """What the embedding may take: of the allowed types those that it can, or else all that it can."""
    return tuple(f for f in types if f.name in target.embedding_types) or tuple(
        target.type(name) for name in target.embedding_types
    )


def pair_types(types: tuple[WeightType, ...]) -> tuple[tuple[str, str], ...]:
    """Every combination of types of (down, up) that a candidate may have; floats, which do not round, left out."""
    ranks = range(32, 257, 32)  # every remainder that a block size can leave
    found = {(down.name, up.name): None for down in types for rank in ranks for up in _partners(down, types, rank)}
    floats = {f.name for f in types if f.is_float}
    return tuple(pair for pair in found if not set(pair) <= floats)


def residual_bases(layout: Layout, types: tuple[WeightType, ...]) -> tuple[str, ...]:
    """Types of the bases whose low-rank correction is a candidate."""
    if not {f.name for f in types} & {name for name, _ in layout.residual_pairs}:
        return ()
    return tuple(f.name for f in types if not f.is_float)


def _dense(
    name: str,
    shape: tuple[int, ...],
    sensitivity: float,
    types: tuple[WeightType, ...],
    module: ModuleScores | None,
    errors: RoundingErrors,
) -> Candidates:
    table, fitting = _dense_options(shape, types)
    if not fitting:
        names = ", ".join(f"{f.name} (blocks of {f.block})" for f in types)
        raise UnsupportedError(
            f"{name}: rows of {shape[-1]} weights fit none of the allowed types: {names}.\nAllow another with  --types"
        )
    loss = np.array([errors.dense_loss(name, f.name, sensitivity * f.relative_mse) for f in fitting])
    return Candidates(name, table, loss, module)


@lru_cache(maxsize=256)
def _dense_options(shape: tuple[int, ...], types: tuple[WeightType, ...]) -> tuple[Options, tuple[WeightType, ...]]:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    fitting = tuple(f for f in types if f.fits(columns))
    return (
        Options(tuple(TensorDecision("", shape, "dense", f.nbytes(rows, columns), type=f.name) for f in fitting)),
        fitting,
    )


def _linear(
    name: str,
    module: ModuleScores,
    losses: npt.NDArray[np.float64],
    layout: Layout,
    types: tuple[WeightType, ...],
    errors: RoundingErrors,
) -> Candidates:
    dense = _dense(name, module.shape, module.sensitivity, types, module, errors)
    if layout.low_rank is None:
        return dense
    shared, of = _linear_options(module.shape, len(losses), layout, types), name.removesuffix(".weight")
    dropped = np.r_[np.cumsum(losses[module.order][::-1])[::-1], 0.0]
    up_rounding = np.cumsum(module.up_sensitivity[module.order], dtype=np.float64)
    down_rounding = np.cumsum(module.down_sensitivity[module.order], dtype=np.float64)
    pairs = shared.up_mse * up_rounding[shared.rank - 1] + shared.down_mse * down_rounding[shared.rank - 1]
    for (down, up), at in shared.pairs:
        pairs[at] *= errors.pair_ratios(of, down, up, shared.rank[at] / len(losses))
    ratios = [errors.residual_ratio(of, base, rank / len(losses)) for _, base, rank in shared.residuals]
    measured = [ratio is not None for ratio in ratios]
    residuals = [
        dense.loss[number] * ratio
        for (number, _, _), ratio in zip(shared.residuals, ratios, strict=True)
        if ratio is not None
    ]
    table = shared.table
    if not all(measured):
        first = len(table.decisions) - len(ratios)
        table = table.subset((*range(first), *(first + int(i) for i in np.flatnonzero(measured))))
    return Candidates(name, table, np.r_[dense.loss, dropped[shared.rank] + pairs, residuals], module)


@dataclass(frozen=True, eq=False)
class _LinearOptions:
    """What the candidates of all linear layers of one shape share.

    Attributes:
        table: dense matrices, then pairs, then corrected bases.
        rank, up_mse, down_mse: (pairs,) rank and relative errors of each pair. pairs: by types of (down, up), which
            pairs have them.
        residuals: number of the dense candidate, its type and the rank of its correction.
    """

    table: Options
    rank: IntArray
    up_mse: npt.NDArray[np.float64]
    down_mse: npt.NDArray[np.float64]
    pairs: tuple[tuple[tuple[str, str], IntArray], ...]
    residuals: tuple[tuple[int, str, int], ...]


@lru_cache(maxsize=256)
def _linear_options(
    shape: tuple[int, ...], components: int, layout: Layout, types: tuple[WeightType, ...]
) -> _LinearOptions:
    rows, columns = shape
    dense = _dense_options(shape, types)[0].decisions
    largest = max(option.nbytes for option in dense)
    base = None if layout.base_type is None else weight_type(types[0].format, layout.base_type)
    fits = base is None or base.fits(columns)
    base_bytes = base.nbytes(rows, columns) if base is not None and fits else 0
    options: list[TensorDecision] = []
    errors: list[tuple[float, float]] = []
    for rank in _ranks(components, layout.rank_multiple) if fits else ():
        for down in types:
            if not down.fits(columns):
                continue
            for up in _partners(down, types, rank):
                nbytes = base_bytes + up.nbytes(rows, rank) + down.nbytes(rank, columns)
                if nbytes >= largest:
                    continue
                options.append(
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
                errors.append((up.relative_mse, down.relative_mse))
    by_types: dict[tuple[str, str], list[int]] = {}
    for number, option in enumerate(options):
        by_types.setdefault((str(option.down_type), str(option.up_type)), []).append(number)
    corrected = _residuals(shape, components, layout, types, dense) if fits else []
    corrected = [(number, option) for number, option in corrected if option.nbytes < largest]
    mse = np.array(errors).reshape(-1, 2)
    return _LinearOptions(
        Options((*dense, *options, *(option for _, option in corrected))),
        np.array([option.rank for option in options], np.int64),
        mse[:, 0],
        mse[:, 1],
        tuple((key, np.array(numbers)) for key, numbers in by_types.items()),
        tuple((number, str(option.type), option.rank or 0) for number, option in corrected),
    )


def _residuals(
    shape: tuple[int, ...],
    components: int,
    layout: Layout,
    types: tuple[WeightType, ...],
    dense: tuple[TensorDecision, ...],
) -> list[tuple[int, TensorDecision]]:
    """Number of the base, and the base with a low-rank correction."""
    rows, columns = shape
    allowed = {f.name: f for f in types}
    found = []
    for number, option in enumerate(dense):
        for pair, rank in layout.residual_pairs:
            form = allowed.get(pair)
            if form is None or not (form.fits(columns) and form.fits(rank)) or 2 * rank > components:
                continue
            nbytes = option.nbytes + form.nbytes(rows, rank) + form.nbytes(rank, columns)
            found.append(
                (
                    number,
                    replace(option, representation="residual", nbytes=nbytes, rank=rank, up_type=pair, down_type=pair),
                )
            )
    return found


def _ranks(components: int, multiple: int) -> list[int]:
    """Multiples of ``multiple``, evenly thinned where a wide layer has very many."""
    step = multiple * max(1, -(-components // (multiple * _MOST_RANKS)))
    return list(range(step, components, step))


def _partners(down: WeightType, types: tuple[WeightType, ...], rank: int) -> list[WeightType]:
    """Formats for ``up`` worth pairing with ``down``: its own where the rank fits its block, else the two closest."""
    if down.fits(rank):
        return [down]
    fitting = [f for f in types if f.fits(rank)]
    return sorted(fitting, key=lambda f: abs(f.bits_per_weight - down.bits_per_weight))[:2]
