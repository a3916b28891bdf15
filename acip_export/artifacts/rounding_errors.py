"""What rounding costs, measured on a model's own weights: the cache beside a score file. See docs/rounding-errors.md.

Without it the planner falls back on the errors that :mod:`acip_export.weight_types` has for Gaussian weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import log
from pathlib import Path

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.plan import TensorDecision
from acip_export.io.atomic import keep

logger = logging.getLogger(__name__)

ROUNDING_ERRORS_VERSION = 2
# Ratios are interpolated in their logarithm; a pair that rounds without any error has this one.
_LEAST_RATIO = 1e-6

Ratios = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RoundingErrors:
    """Measured errors for one score file and one target.

    Attributes:
        quantizer: package and version that rounded. scores_sha256: of the score file.
        dense: predicted loss of rounding the dense weight, nats per token, by tensor and type.
        pairs: by module and ``DOWN*UP`` types: what a fitted pair loses by rounding, over what the table of formats
            says, as ``(rank / full rank, ratio)`` by growing rank; by module and ``BASE+``: what a base with a low-rank
            correction loses, over what the base loses alone.
    """

    format: str
    quantizer: str
    scores_sha256: str
    dense: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, Ratios]] = field(default_factory=dict)

    def dense_loss(self, tensor: str, name: str, expected: float) -> float:
        """Loss of rounding ``tensor`` to the type ``name``; ``expected`` where it was not measured."""
        return self.dense.get(tensor, {}).get(name, expected)

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
        return RoundingErrors(
            self.format,
            self.quantizer,
            self.scores_sha256,
            {n: {**self.dense.get(n, {}), **other.dense.get(n, {})} for n in {**self.dense, **other.dense}},
            {n: {**self.pairs.get(n, {}), **other.pairs.get(n, {})} for n in {**self.pairs, **other.pairs}},
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


def cache_file(scores: Path, target: str) -> Path:
    """``llama.acip`` -> ``llama.acip.rounding-gguf.json``."""
    return scores.with_name(f"{scores.name}.rounding-{target}.json")


def load_rounding_errors(file: Path, target: str, quantizer: str, scores_sha256: str) -> RoundingErrors:
    """What the cache knows; empty when there is none, or when it is of another model, quantizer or version."""
    nothing = RoundingErrors(target, quantizer, scores_sha256)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        same = (
            data["artifact"] == "acip-rounding-errors"
            and data["version"] == ROUNDING_ERRORS_VERSION
            and (data["format"], data["quantizer"], data["scores_sha256"]) == (target, quantizer, scores_sha256)
        )
        if not same:
            return nothing
        return RoundingErrors(
            target,
            quantizer,
            scores_sha256,
            {name: {t: _loss(v) for t, v in types.items()} for name, types in data["dense"].items()},
            {
                name: {key: tuple((float(s), _loss(r)) for s, r in points) for key, points in pairs.items()}
                for name, pairs in data["pairs"].items()
            },
        )
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # A cache: it is made again, not mourned.
        logger.warning("%s is damaged and is measured again: %r", file, error)
        return nothing


def _loss(value: float) -> float:
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{value} is no loss")
    return float(value)


def save_rounding_errors(errors: RoundingErrors, file: Path) -> None:
    """Write atomically, replacing what is there; a directory that cannot be written to is no error."""
    document = {"artifact": "acip-rounding-errors", "version": ROUNDING_ERRORS_VERSION, **asdict(errors)}
    keep(file, (json.dumps(document, indent=1) + "\n").encode(), "rounding errors are measured")
