"""Everything that could become of each tensor: representation x rank x format, with exact bytes and predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from acip_export.checkpoint import Checkpoint
from acip_export.errors import UnsupportedError
from acip_export.formats import WeightFormat, weight_format
from acip_export.plan.allocate import Choices
from acip_export.plan.memory import repacked_bytes
from acip_export.plans import TensorDecision
from acip_export.rounding_errors import RoundingErrors
from acip_export.scores import ModuleScores, ScoreFile
from acip_export.targets import Layout, Target

# More ranks than this per layer refine the plan less than the block sizes coarsen it.
_MOST_RANKS = 48


@dataclass(frozen=True)
class Candidates:
    """The candidates of one tensor.

    Attributes:
        options: decisions without kept units; they are filled in for the chosen one by :meth:`decision`.
        loss: (n,) predicted loss of each.
        tied_head: the tensor is an embedding that the head reads too.
    """

    options: tuple[TensorDecision, ...]
    loss: npt.NDArray[np.float64]
    module: ModuleScores | None
    tied_head: bool = False

    def choices(self, target: str, scope: str) -> Choices:
        """Bytes as the budget's scope counts them."""
        return Choices(np.array([self.cost(i, target, scope) for i in range(len(self.options))], np.int64), self.loss)

    def cost(self, chosen: int, target: str, scope: str) -> int:
        """Stored bytes, and in memory what the runtime keeps beside them."""
        option = self.options[chosen]
        if scope == "file":
            return option.nbytes
        kind = (option.shape, option.rank, option.format, option.up_format, option.down_format)
        return option.nbytes + _kept_beside(*kind, target, self.tied_head)

    def only(self, allowed: Callable[[Candidates, TensorDecision], bool]) -> Candidates:
        """The candidates that ``allowed(self, option)`` lets through."""
        kept = [i for i, option in enumerate(self.options) if allowed(self, option)]
        return replace(self, options=tuple(self.options[i] for i in kept), loss=self.loss[kept])

    def dense_only(self) -> Candidates:
        """The candidates without low rank: what quantization alone could do."""
        return self.only(lambda _, option: option.rank is None)

    def decision(self, chosen: int) -> TensorDecision:
        """The option with the kept units written down."""
        option = self.options[chosen]
        if option.rank is None or self.module is None or option.representation == "residual":
            return option
        kept = _ranges(np.sort(self.module.order[: option.rank]))
        return replace(option, kept=kept)


@lru_cache(maxsize=100_000)
def _kept_beside(
    shape: tuple[int, ...],
    rank: int | None,
    form: str | None,
    up: str | None,
    down: str | None,
    target: str,
    tied_head: bool,
) -> int:
    """:func:`repacked_bytes` by what it depends on: the layers of a model have the same shapes over and over."""
    option = TensorDecision("", shape, "dense", 0, form, rank, up, down)
    return repacked_bytes(option, target, tied_head)[0]


def _ranges(units: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    breaks = np.flatnonzero(np.diff(units) != 1)
    starts = units[np.r_[0, breaks + 1]]
    stops = units[np.r_[breaks, len(units) - 1]] + 1
    return tuple((int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def build_candidates(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    losses: dict[str, npt.NDArray[np.float64]],
    target: Target,
    layout: Layout,
    types: tuple[WeightFormat, ...],
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
    # An encoder's small tables and heads, whose rounding no ranking measures; runtimes add some of them as they are.
    tables = set() if checkpoint.shape.generates else set(checkpoint.tensors) - set(scores.embedding_sensitivity)
    built = []
    for name, info in checkpoint.tensors.items():
        module = scores.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is not None:
            built.append(_linear(name, module, losses[name.removesuffix(".weight")], layout, types, errors))
        elif len(info.shape) == 2 and name not in tables:
            sensitivity = scores.embedding_sensitivity.get(name, 0.0)
            embedding = _dense(name, info.shape, sensitivity, embedding_types, None, errors)
            built.append(replace(embedding, tied_head=checkpoint.shape.tied_embeddings))
        else:
            vector = weight_format(target.name, target.vector_format)
            built.append(_dense(name, info.shape, 0.0, (vector,), None, errors))
    return tuple(built)


def choose_embedding_types(target: Target, types: tuple[WeightFormat, ...]) -> tuple[WeightFormat, ...]:
    """What the embedding may take: of the allowed types those that it can, or else all that it can."""
    return tuple(f for f in types if f.name in target.embedding_types) or tuple(
        weight_format(target.name, name) for name in target.embedding_types
    )


def pair_types(types: tuple[WeightFormat, ...]) -> tuple[tuple[str, str], ...]:
    """Every combination of types of (down, up) that a candidate may have; floats, which do not round, left out."""
    ranks = range(32, 257, 32)  # every remainder that a block size can leave
    found = {(down.name, up.name): None for down in types for rank in ranks for up in _partners(down, types, rank)}
    floats = {f.name for f in types if f.is_float}
    return tuple(pair for pair in found if not set(pair) <= floats)


def residual_bases(layout: Layout, types: tuple[WeightFormat, ...]) -> tuple[str, ...]:
    """Types of the bases whose low-rank correction is a candidate."""
    if not {f.name for f in types} & {name for name, _ in layout.residual_pairs}:
        return ()
    return tuple(f.name for f in types if not f.is_float)


def _dense(
    name: str,
    shape: tuple[int, ...],
    sensitivity: float,
    types: tuple[WeightFormat, ...],
    module: ModuleScores | None,
    errors: RoundingErrors,
) -> Candidates:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    fitting = [f for f in types if f.fits(columns)]
    if not fitting:
        names = ", ".join(f"{f.name} (blocks of {f.block})" for f in types)
        raise UnsupportedError(
            f"{name}: rows of {columns} weights fit none of the allowed types: {names}.\nAllow another with  --types"
        )
    return Candidates(
        tuple(TensorDecision(name, shape, "dense", f.nbytes(rows, columns), format=f.name) for f in fitting),
        np.array([errors.dense_loss(name, f.name, sensitivity * f.relative_mse) for f in fitting]),
        module,
    )


def _linear(
    name: str,
    module: ModuleScores,
    losses: npt.NDArray[np.float64],
    layout: Layout,
    types: tuple[WeightFormat, ...],
    errors: RoundingErrors,
) -> Candidates:
    dense = _dense(name, module.shape, module.sensitivity, types, module, errors)
    if layout.low_rank is None:
        return dense
    rows, columns = module.shape
    base = None if layout.base_format is None else weight_format(types[0].target, layout.base_format)
    if base is not None and not base.fits(columns):
        return dense
    base_bytes = 0 if base is None else base.nbytes(rows, columns)
    largest = max(option.nbytes for option in dense.options)
    dropped = np.cumsum(losses[module.order][::-1])[::-1]
    up_rounding = np.cumsum(module.up_sensitivity[module.order], dtype=np.float64)
    down_rounding = np.cumsum(module.down_sensitivity[module.order], dtype=np.float64)
    options, loss = list(dense.options), list(dense.loss)
    for rank in _ranks(len(losses), layout.rank_multiple):
        for down in types:
            if not down.fits(columns):
                continue
            for up in _partners(down, types, rank):
                nbytes = base_bytes + up.nbytes(rows, rank) + down.nbytes(rank, columns)
                if nbytes >= largest:
                    continue
                options.append(
                    TensorDecision(
                        name,
                        module.shape,
                        layout.low_rank,
                        nbytes,
                        format=layout.base_format,
                        rank=rank,
                        up_format=up.name,
                        down_format=down.name,
                    )
                )
                rounding = up.relative_mse * up_rounding[rank - 1] + down.relative_mse * down_rounding[rank - 1]
                rounding *= errors.pair_ratio(name.removesuffix(".weight"), down.name, up.name, rank / len(losses))
                loss.append((dropped[rank] if rank < len(dropped) else 0.0) + rounding)
    for option, value in _residuals(name, module, layout, types, dense, errors):
        if option.nbytes < largest:
            options.append(option)
            loss.append(value)
    return Candidates(tuple(options), np.array(loss), module)


def _residuals(
    name: str,
    module: ModuleScores,
    layout: Layout,
    types: tuple[WeightFormat, ...],
    dense: Candidates,
    errors: RoundingErrors,
) -> Iterator[tuple[TensorDecision, float]]:
    """A quantized base with a low-rank correction, where it was measured what that gains."""
    rows, columns = module.shape
    allowed = {f.name: f for f in types}
    for option, loss in zip(dense.options, dense.loss, strict=True):
        assert option.format is not None
        for pair, rank in layout.residual_pairs:
            form = allowed.get(pair)
            if form is None or not (form.fits(columns) and form.fits(rank)) or 2 * rank > len(module.scores):
                continue
            ratio = errors.residual_ratio(name.removesuffix(".weight"), option.format, rank / len(module.scores))
            if ratio is None:
                continue
            nbytes = option.nbytes + form.nbytes(rows, rank) + form.nbytes(rank, columns)
            corrected = replace(
                option, representation="residual", nbytes=nbytes, rank=rank, up_format=pair, down_format=pair
            )
            yield corrected, float(loss) * ratio


def _ranks(components: int, multiple: int) -> list[int]:
    """Multiples of ``multiple``, evenly thinned where a wide layer has very many."""
    step = multiple * max(1, -(-components // (multiple * _MOST_RANKS)))
    return list(range(step, components, step))


def _partners(down: WeightFormat, types: tuple[WeightFormat, ...], rank: int) -> list[WeightFormat]:
    """Formats for ``up`` worth pairing with ``down``: its own where the rank fits its block, else the two closest."""
    if down.fits(rank):
        return [down]
    fitting = [f for f in types if f.fits(rank)]
    return sorted(fitting, key=lambda f: abs(f.bits_per_weight - down.bits_per_weight))[:2]
