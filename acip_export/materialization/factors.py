"""From one weight, its scores and a decision to the numbers that the bundle stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from acip_export.artifacts.scores import FloatArray, ModuleScores, ScoreFile
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.components import fold
from acip_export.lowrank.moments import PackedMoment, is_projected, lifted, moment_name
from acip_export.lowrank.whitening import DAMPING, Whitening


@dataclass(frozen=True)
class Pair:
    """A factor pair, float32: ``up`` (out, rank), ``down`` (rank, in)."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Moments:
    """Full second moments of one module; ``None`` is the identity."""

    inputs: Whitening | None
    gradients: Whitening | None

    @classmethod
    def of(cls, module: ModuleScores, packed: Mapping[str, PackedMoment], weight: Tensor) -> Moments:
        """Unpack them; ``weight`` is the dense one, without adapters."""
        return cls(
            whitening(packed[module.input_key], module.input_key) if module.input_key else None,
            _gradients(module, packed[module.gradient_key], weight) if module.gradient_key else None,
        )


def whitening(packed: PackedMoment, key: str) -> Whitening:
    """Take a second moment of the score file; raises ScoreFileError where it overflows."""
    return Whitening.packed(packed, moment_name(key))


def _gradients(module: ModuleScores, packed: PackedMoment, weight: Tensor) -> Whitening:
    part = whitening(packed, module.gradient_key)
    return Whitening.lifted(part, module.gradient_moment, weight) if is_projected(module.shape) else part


def basis_moments(scores: ScoreFile, module: ModuleScores, weight: Tensor) -> Moments:
    """The moments that the score file's basis is made of (a plain SVD has none, whatever was measured)."""
    if scores.basis == "svd":
        return Moments(None, None)
    moments = Moments.of(module, scores.second_moments, weight)
    return moments if scores.basis == "kfac" else Moments(moments.inputs, None)


def dense_weight(weight: Tensor, module: ModuleScores | None, adapters: bool) -> Tensor:
    """The weight itself, or with the adapters added: then float32."""
    adapter = module.adapter(min(weight.shape)) if module is not None and adapters else None
    if adapter is None:
        return weight
    b, a = map(torch.from_numpy, adapter)
    return weight.float() + b @ a


def factor_pair(
    weight: Tensor,
    module: ModuleScores,
    moments: Moments,
    kept: tuple[tuple[int, int], ...],
    adapters: bool,
    cache: FactorCache | None = None,
) -> Pair:
    """The kept singular components of ``weight``, adapters folded in at the same rank.

    Args:
        weight: (out, in). kept: ``[start, stop)`` ranges of components. cache: of factors made before.
    """
    right, left = moments.inputs, moments.gradients
    basis = (cache or FactorCache(None)).components(weight, right, left)
    units = torch.cat([torch.arange(start, stop) for start, stop in kept])
    pair = Pair(basis.up[:, units], basis.down[units])
    adapter = module.adapter(len(units)) if adapters else None
    if adapter is None:
        return pair
    b, a = map(torch.from_numpy, adapter)
    return Pair(*fold(pair.up, pair.down, b, a, right, left))


@dataclass(frozen=True)
class Norm:
    """What a change of a weight costs: 1/2 tr(G dW H dW^T), nats per token.

    Attributes:
        inputs: H (in, in), gradients: G (out, out), float64, damped as in
            :mod:`acip_export.lowrank.components`; diagonal where the score file holds no more.
    """

    inputs: Tensor
    gradients: Tensor

    @classmethod
    def of(
        cls,
        module: ModuleScores,
        packed: Mapping[str, PackedMoment],
        weight: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Norm:
        """Unpack the moments.

        Args:
            weight: the dense one, without adapters. rows, columns: of it, for changes of these alone.
        """
        inputs = gradients = None
        if module.input_key:
            inputs = packed[module.input_key].unpacked(moment_name(module.input_key), columns)
        if module.gradient_key:
            kept, name = packed[module.gradient_key], moment_name(module.gradient_key)
            if is_projected(module.shape):
                gradients = lifted(kept.unpacked(name), module.gradient_moment, weight, rows)
            else:
                gradients = kept.unpacked(name, rows)
        return cls(damp_(inputs, module.input_moment, columns), damp_(gradients, module.gradient_moment, rows))

    def loss(self, change: Tensor) -> float:
        """Of a change (out, in)."""
        wide = change.double()
        return 0.5 * float(((self.gradients @ wide) * (wide @ self.inputs)).sum())


def damp_(known: Tensor | None, diagonal: FloatArray, part: Tensor | None = None) -> Tensor:
    """Damp a second moment, (n, n) float64, in its place, and return it.

    Args:
        known: ``None`` where there is only its diagonal. diagonal: of the moment of all columns, of which ``known`` may
            be of a ``part``.
    """
    wide = torch.from_numpy(diagonal).double()
    if known is None:
        known = torch.diag(wide if part is None else wide[part])
    elif part is None:
        wide = known.diagonal()
    known.diagonal().add_(DAMPING * wide.mean())
    return known


def inner_importance(down: Tensor, inputs: Tensor) -> Tensor:
    """Second moments of ``down(x)``, (rank,) float32: what the columns of ``up`` are multiplied with.

    Args:
        inputs: (in, in) E[x x^T], float64.
    """
    return ((down.double() @ inputs) * down.double()).sum(1).clamp_min(0).float()
