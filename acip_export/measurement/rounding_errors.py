"""Measure what a format's quantizer costs on the weights and factors of this very model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from acip_export.artifacts.rounding_errors import Ratios, RoundingErrors, pair_key, residual_key
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.feedback_cache import FeedbackCache
from acip_export.lowrank.losses import component_losses
from acip_export.lowrank.moments import PackedMoment, moment_name, pack_moment
from acip_export.lowrank.whitening import DAMPING, Whitening
from acip_export.materialization.factors import Norm, Pair
from acip_export.materialization.refit import refit
from acip_export.materialization.residual import correct
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import layer_of
from acip_export.progress import Progress, ProgressCallback, silent, types_stage
from acip_export.rounding.error_feedback import FeedbackFactor
from acip_export.rounding.quantizer import InputMoments, RoundTrip
from acip_export.weight_types import WeightType, weight_type

# Weights of a tensor that are rounded to each type, in whole rows and at least so many of them.
_SAMPLED_WEIGHTS, _LEAST_ROWS = 1 << 15, 16
# Pairs are measured on at most so many rows and columns of a layer: a singular value decomposition of all of a large
# one takes minutes, and the ratio that is measured hardly depends on the size.
LARGEST_SIDE = 512
# Layers of each kind (q_proj, up_proj, ...) whose pairs are measured, spread over the depth; the others take the
# nearest one's ratios.
_LAYERS_OF_A_KIND = 2
_RANK_SHARES = (0.25, 0.75)


def _ignore(_measured: RoundingErrors) -> None:
    pass


def measure_rounding(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    wanted: RoundingErrors,
    dense: dict[str, tuple[str, ...]],
    pairs: tuple[tuple[str, str], ...],
    bases: tuple[str, ...],
    corrections: tuple[tuple[str, int], ...],
    round_trip: RoundTrip,
    progress: ProgressCallback = silent,
    feedback_types: Collection[str] = (),
    grown: Callable[[RoundingErrors], None] = _ignore,
) -> RoundingErrors:
    """Measure and return everything that ``wanted`` lacks.

    Args:
        dense: types by tensor. pairs: types of (down, up). bases: types of bases with a low-rank correction, which
            ``corrections`` has the types and ranks of. feedback_types: those that are rounded with error feedback.
        grown: told what is known so far, after each tensor.
    """
    missing = {
        name: types
        for name, allowed in dense.items()
        if (types := tuple(t for t in allowed if t not in wanted.dense.get(name, {})))
    }
    keys = {pair_key(*pair) for pair in pairs} | {residual_key(base) for base in bases}
    # The same ones, whatever is known of them.
    sampled = spread(list(scores.modules))
    lacking = [name for name in sampled if not keys <= wanted.pairs.get(name, {}).keys()]
    total, done = len(missing) + len(lacking), 0
    known, stage = wanted, types_stage(wanted.format)

    def note(new: RoundingErrors) -> None:
        nonlocal known, done
        known, done = known.merged(new), done + 1
        grown(known)

    for key, names in _by_input(scores, missing):
        wanted_types = {form for name in names for form in missing[name]}
        inputs = _Inputs.of(scores, key, not wanted_types.isdisjoint(feedback_types))
        for name in names:
            progress(Progress(stage, done, total, name))
            losses = dict(_dense(checkpoint, scores, name, missing[name], round_trip, inputs, feedback_types))
            note(replace(wanted, dense={name: losses}, pairs={}))
    for name in lacking:
        progress(Progress(stage, done, total, name))
        new = [p for p in pairs if pair_key(*p) not in wanted.pairs.get(name, {})]
        new_bases = [base for base in bases if residual_key(base) not in wanted.pairs.get(name, {})]
        formats = [(weight_type(wanted.format, d), weight_type(wanted.format, u)) for d, u in new]
        problem = _Sample.of(checkpoint, scores, name, bool(feedback_types))
        ratios = dict(_pairs(problem, formats, round_trip))
        for base in new_bases:
            form = weight_type(wanted.format, base)
            ratios[residual_key(base)] = _residual(problem, form, corrections, round_trip)
        note(replace(wanted, dense={}, pairs={name: ratios}))
    progress(Progress(stage, total, total))
    everywhere = {name: known.pairs[_nearest(name, sampled)] for name in scores.modules} if keys else known.pairs
    # In the order of the model, whichever were measured first.
    ordered = {name: known.dense[name] for name in (*dense, *known.dense) if name in known.dense}
    whole = replace(known, dense=ordered, pairs=everywhere)
    grown(whole)
    return whole


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def spread(modules: Sequence[str]) -> list[str]:
    """At most ``_LAYERS_OF_A_KIND`` modules of each kind, evenly over the depth."""
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(_kind(name), []).append(name)
    chosen = []
    for names in kinds.values():
        count = min(_LAYERS_OF_A_KIND, len(names))
        chosen += [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
    return [name for name in modules if name in set(chosen)]


def _nearest(module: str, measured: list[str]) -> str:
    """The measured module of the same kind that is closest in depth; ``measured`` is in the order of depth."""
    same = [name for name in measured if _kind(name) == _kind(module)]
    depth = layer_of(module) or 0
    return min(same, key=lambda name: abs((layer_of(name) or 0) - depth))


def _rows(total: int, columns: int) -> Tensor:
    """Evenly spaced row numbers: enough for ``_SAMPLED_WEIGHTS``."""
    count = sampled_rows(total, columns)
    return (torch.arange(count, dtype=torch.float64) + 0.5).mul(total / count).long()


def sampled_rows(total: int, columns: int) -> int:
    """Return how many of a tensor's rows are rounded."""
    return min(total, max(_LEAST_ROWS, _SAMPLED_WEIGHTS // columns))


def _by_input(scores: ScoreFile, tensors: Iterable[str]) -> list[tuple[str | None, list[str]]]:
    """Group tensors by what they read: unpacking its second moment takes longer than rounding one of them."""
    groups: dict[str | None, list[str]] = {}
    for name in tensors:
        groups.setdefault(scores.moment_key(name) or None, []).append(name)
    return list(groups.items())


@dataclass(frozen=True)
class _Inputs:
    """What several tensors read: its second moment, with a root and the factor of error feedback where it is known."""

    moment: PackedMoment | None = None
    root: Tensor | None = None
    factor: FeedbackFactor | None = None

    @classmethod
    def of(cls, scores: ScoreFile, key: str | None, with_factor: bool) -> _Inputs:
        if not key:
            return cls()
        moment, name = scores.moment(key), moment_name(key)
        # First what takes more memory while it is made.
        factor = FeedbackCache().factor(moment, name) if with_factor else None
        return cls(moment, moment.exact_root(name, torch.float32), factor)

    def cost(self, changes: Tensor, added: Tensor) -> Tensor:
        """Return what changes of rows, (n, in), cost each.

        Args:
            added: (in,), to the diagonal of the moment, or that diagonal itself where no more is known.
        """
        costs: Tensor = changes.square() @ added
        if self.root is not None and self.moment is not None:
            rotated = changes[:, torch.from_numpy(self.moment.order)].float() @ self.root
            costs = costs + rotated.double().square().sum(1)
        return costs


def _dense(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    tensor: str,
    types: Iterable[str],
    round_trip: RoundTrip,
    inputs: _Inputs,
    feedback_types: Collection[str],
) -> Iterator[tuple[str, float]]:
    """Predicted loss of each type: the sampled rows' share of the exact sensitivity."""
    weight = checkpoint.read(tensor)
    rows = _rows(*weight.shape)
    sample = weight[rows].float()
    module = scores.modules.get(tensor.removesuffix(".weight"))
    if module is None:
        # The embedding, or an untied head: every row counts alike.
        sensitivity, plain = scores.embedding_sensitivity.get(tensor, 0.0), None
        gradients, damping = torch.ones(len(rows)).double(), 0.0
        known = np.ones(weight.shape[1]) if inputs.moment is None else inputs.moment.diagonal
    else:
        sensitivity, plain = module.sensitivity, InputMoments(torch.from_numpy(module.input_moment))
        gradients = torch.from_numpy(module.gradient_moment).double()[rows]
        known = module.input_moment if inputs.moment is None else inputs.moment.diagonal
        damping = DAMPING
    diagonal = torch.from_numpy(known).double()
    added = (damping * diagonal.mean()).expand(len(diagonal))
    damped = diagonal + added
    informed = plain if inputs.factor is None else InputMoments(damped.float(), inputs.factor)
    energy = float(gradients @ sample.double().square() @ damped)
    for name in types:
        change = (round_trip(sample, name, informed if name in feedback_types else plain) - sample).double()
        loss = float(gradients @ inputs.cost(change, damped if inputs.moment is None else added))
        yield name, sensitivity * loss / max(energy, 1e-300)


@dataclass(frozen=True)
class _Sample:
    """A layer, or evenly spaced rows and columns of a large one."""

    weight: Tensor
    norm: Norm
    whitenings: tuple[Whitening, Whitening]
    inputs: InputMoments

    @classmethod
    def of(cls, checkpoint: Checkpoint, scores: ScoreFile, name: str, feedback: bool) -> _Sample:
        module = scores.modules[name]
        weight, norm = _cropped(checkpoint.read(f"{name}.weight"), module, scores)
        label = moment_name(module.input_key)
        factor = None
        if feedback and module.input_key:
            packed, whole = pack_moment(norm.inputs, label), scores.moment(module.input_key)
            # Of some columns only: as much chance for each as when all are rounded.
            tokens = None if whole.tokens is None else max(1, whole.tokens * packed.size // whole.size)
            factor = replace(packed, tokens=tokens).feedback_factor(label)
        inputs = InputMoments(norm.inputs.diagonal().float(), factor)
        return cls(weight, norm, (Whitening.of(norm.inputs), Whitening.of(norm.gradients)), inputs)


def _pairs(
    sample: _Sample, formats: list[tuple[WeightType, WeightType]], round_trip: RoundTrip
) -> Iterator[tuple[str, Ratios]]:
    weight, norm = sample.weight, sample.norm
    if not formats:
        return
    basis = whitened_components(weight, *sample.whitenings)
    losses = component_losses(basis, norm.inputs, norm.gradients)
    full = len(basis.singular)
    for down, up in formats:
        points = []
        for rank in measured_ranks(full, up) if down.fits(weight.shape[1]) else []:
            fitted = refit(Pair(basis.up[:, :rank], basis.down[:rank]), norm, sample.inputs, up, down, round_trip)
            expected = up.relative_mse * float(losses.up_sensitivity[:rank].sum())
            expected += down.relative_mse * float(losses.down_sensitivity[:rank].sum())
            points.append((rank / full, fitted.loss / max(expected, 1e-300)))
        # Noted even when nothing fits, so that it is not tried again.
        yield pair_key(down.name, up.name), tuple(points)


def _residual(
    sample: _Sample, base: WeightType, corrections: tuple[tuple[str, int], ...], round_trip: RoundTrip
) -> Ratios:
    weight, norm = sample.weight, sample.norm
    columns, full = weight.shape[1], min(weight.shape)
    if not base.fits(columns):
        return ()
    alone = norm.loss(weight - round_trip(weight, base.name, sample.inputs))
    # Without a correction nothing is gained: smaller ranks than the measured ones lie in between.
    points = [(0.0, 1.0)]
    for name, rank in corrections[1::2]:
        form = weight_type(base.format, name)
        if form.fits(columns) and form.fits(rank) and 2 * rank <= full:
            found = correct(weight, norm, sample.whitenings, sample.inputs, base, rank, (form, form), round_trip)
            points.append((rank / full, min(1.0, found.loss / max(alone, 1e-300))))
    return tuple(points)


def measured_ranks(full: int, up: WeightType) -> list[int]:
    """Return the ranks whose pairs are measured, of a layer of rank ``full``."""
    multiple = max(32, 1 if up.pads_rows else up.block)
    ranks = {max(multiple, round(share * full / multiple) * multiple) for share in _RANK_SHARES}
    return sorted(rank for rank in ranks if rank <= full)


def _cropped(weight: Tensor, module: ModuleScores, scores: ScoreFile) -> tuple[Tensor, Norm]:
    """Evenly spaced rows and columns of a large layer, with their moments."""
    if max(weight.shape) <= 2 * LARGEST_SIDE:
        weight = weight.float()
        return weight, Norm.of(module, scores.second_moments, weight)
    rows, columns = ((torch.arange(min(n, LARGEST_SIDE)) * n) // min(n, LARGEST_SIDE) for n in weight.shape)
    norm = Norm.of(module, scores.second_moments, weight, rows, columns)
    return weight[rows][:, columns].float(), norm
