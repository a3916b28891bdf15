"""Store what rounding costs on a model's own weights, in a cache beside its score file. See docs/rounding-errors.md.

Without it the planner falls back on the errors that :mod:`acip_export.weight_types` has for Gaussian weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.cache import FormatCache, load_cache
from acip_export.artifacts.names import ROUNDING_ERRORS, ArtifactName
from acip_export.artifacts.plan import TensorDecision
from acip_export.io.atomic import keep
from acip_export.io.inputs import NotNegative, Share
from acip_export.rounding.quantizer import Rounding

# Ratios are interpolated in their logarithm; a pair that rounds without any error has this one.
_LEAST_RATIO = 1e-6

# None where the types fit no rank of the layer: noted, so that they are not tried again.
Ratios = tuple[tuple[Share, NotNegative], ...]


@dataclass(frozen=True)
class RoundingErrors(FormatCache):
    """Measured errors for one score file and one format.

    Attributes:
        dense: predicted loss of rounding the dense weight, nats per token, by tensor and type.
        pairs: by module and ``DOWN*UP`` types: what a fitted pair loses by rounding, over what the table of formats
            says, as ``(rank / full rank, ratio)`` by growing rank; by module and ``BASE+``: what a base with a low-rank
            correction loses, over what the base loses alone.
        inputs: predicted loss of rounding what the weight is multiplied with, by tensor and type; only where that was
            measured (:mod:`acip_export.artifacts.measured_losses`).
    """

    NAME: ClassVar[ArtifactName] = ROUNDING_ERRORS

    dense: Mapping[str, Mapping[str, NotNegative]] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, Ratios]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, NotNegative]] = field(default_factory=dict)

    def dense_loss(self, tensor: str, name: str, expected: float) -> float:
        """Loss of rounding ``tensor`` to the type ``name``; ``expected`` where it was not measured."""
        return self.dense.get(tensor, {}).get(name, expected)

    def input_loss(self, tensor: str, name: str) -> float:
        """Loss of rounding what ``tensor`` in the type ``name`` is multiplied with; 0 where it was not measured."""
        return self.inputs.get(tensor, {}).get(name, 0.0)

    def pair_ratios(
        self, module: str, down: str, up: str, shares: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64] | float:
        """Factors on the table's loss of rounding pairs whose ranks are ``shares`` of the full one; 1 if not measured.

        Between measured ranks linear in the logarithm, constant beyond them.
        """
        points = self.pairs.get(module, {}).get(pair_key(down, up))
        return _interpolated(points, shares) if points else 1.0

    def residual_ratio(self, module: str, base: str, share: float) -> float | None:
        """Loss of a corrected base over the loss of the base alone, by rank / full rank; ``None``: not measured."""
        points = self.pairs.get(module, {}).get(residual_key(base))
        return float(_interpolated(points, np.array([share]))[0]) if points else None

    def measured(self, decision: TensorDecision) -> bool:
        """Tell whether what ``decision`` loses by rounding was measured, for a pair at least between some types."""
        if decision.rank is None:
            return decision.type in self.dense.get(decision.name, {})
        return decision.module in self.pairs

    def covers(self, dense: Mapping[str, Iterable[str]], pairs: Iterable[str], modules: Iterable[str]) -> bool:
        """Whether every type of every tensor in ``dense`` and every pair of types in every module was measured.

        Args:
            pairs: as made by :func:`pair_key` and :func:`residual_key`.
        """
        keys = set(pairs)
        return all(set(types) <= self.dense.get(name, {}).keys() for name, types in dense.items()) and all(
            keys <= self.pairs.get(name, {}).keys() for name in modules
        )

    def merged(self, other: RoundingErrors) -> RoundingErrors:
        """Both measurements in one; ``other`` wins."""
        return replace(
            self,
            dense={n: {**self.dense.get(n, {}), **other.dense.get(n, {})} for n in {**self.dense, **other.dense}},
            pairs={n: {**self.pairs.get(n, {}), **other.pairs.get(n, {})} for n in {**self.pairs, **other.pairs}},
        )


def _interpolated(points: Ratios, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    logs = [log(max(ratio, _LEAST_RATIO)) for _, ratio in points]
    interpolated: npt.NDArray[np.float64] = np.exp(np.interp(shares, [share for share, _ in points], logs))
    return interpolated


def residual_key(base: str) -> str:
    """Of a base of this type with a low-rank correction."""
    return f"{base}+"


def pair_key(down: str, up: str) -> str:
    return f"{down}*{up}"


def cache_file(scores: Path, fmt: str, rounding: Rounding = "nearest") -> Path:
    """``llama.acip`` -> ``llama.acip.rounding-gguf.json``, or ``….rounding-gguf-feedback.json``."""
    way = "" if rounding == "nearest" else f"-{rounding}"
    return scores.with_name(f"{scores.name}.rounding-{fmt}{way}.json")


def load_rounding_errors(file: Path, fmt: str, quantizer: str, scores_sha256: str) -> RoundingErrors:
    """What the cache knows; empty when there is none, or when it is of another model, quantizer or version."""
    return load_cache(file, RoundingErrors(format=fmt, quantizer=quantizer, scores_sha256=scores_sha256), _problem)


def _problem(known: RoundingErrors) -> str | None:
    ranks = [[rank for rank, _ in points] for pairs in known.pairs.values() for points in pairs.values()]
    grow = all(a < b for each in ranks for a, b in pairwise(each))
    return None if grow else "$.pairs: the ranks of measured points do not grow"


def save_rounding_errors(errors: RoundingErrors, file: Path) -> bool:
    """Write atomically, replacing what is there; a directory that cannot be written to is no error, but the answer."""
    return keep(file, (json.dumps(errors.to_json(), indent=1) + "\n").encode(), "rounding errors are measured")
