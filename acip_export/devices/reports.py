"""Derive how fast a chip is from what people reported of it: tokens a second of models whose sizes are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from typing import Any

from acip_export.artifacts.speeds import LEAST_ERROR, CacheSpeed, LayerSpeed, MatrixSpeed, RuntimeSpeed
from acip_export.weight_types import WeightType

# What a layer may take beside reading its matrices: up to so many seconds, and half of any answer.
_LAYER_SECONDS, _MOST_OVERHEAD = tuple(step * 1e-5 for step in range(21)), 0.5
# What it is taken for where all reports are of models of about one size, which do not tell, but a tenth of any answer
# at most: then it may be off by twice as much, as the chips that tell differ.
_USUAL_LAYER_SECONDS, _USUAL_OVERHEAD, _USUAL_ERROR, _ALIKE = 1e-4, 0.1, 2.0, 2.0
# Bits a weight, with its share of the scales, of the types with codes of four bits.
_FOUR_BITS = 4.5
# Of a figure that nothing else confirms.
_ALONE_ERROR = 0.5


@dataclass(frozen=True)
class KnownModel:
    """A model that people measure devices with.

    Attributes:
        weights: numbers in the matrices of its layers.
        source: of these figures.
    """

    name: str
    weights: int
    layers: int
    source: str


@dataclass(frozen=True)
class SpeedReport:
    """What somebody measured on a chip.

    Attributes:
        type: that most matrices of the file have.
        nbytes: that a token of an answer reads: of the file, less an embedding that is stored beside the head.
        prompt, answer: tokens a second, the answer's with a short context; ``None``: not reported.
        source: where.
    """

    runtime: str
    model: KnownModel
    type: WeightType
    nbytes: int
    prompt: float | None
    answer: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "model": self.model.name,
            "type": self.type.name,
            "bytes": self.nbytes,
            "prompt": self.prompt,
            "answer": self.answer,
            "source": self.source,
        }


@dataclass(frozen=True)
class Chip:
    """What computes in a device, with its memory."""

    name: str
    title: str
    reports: tuple[SpeedReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "title": self.title, "reports": [report.to_json() for report in self.reports]}

    def speeds(self, types: Mapping[str, Sequence[WeightType]]) -> dict[str, RuntimeSpeed]:
        """Return the speeds of each runtime that was reported, for the types of each format."""
        found: dict[str, RuntimeSpeed] = {}
        for runtime in dict.fromkeys(report.runtime for report in self.reports):
            reports = [report for report in self.reports if report.runtime == runtime]
            found[runtime] = reported_speed(reports, types.get(reports[0].type.format, ()))
        return found


def reported_speed(reports: Sequence[SpeedReport], types: Sequence[WeightType]) -> RuntimeSpeed:
    """Return the speeds of one runtime, for ``types`` and those that were reported.

    An answer takes the time of reading its matrices and of each layer beside that, a prompt that of its operations. A
    type that was not reported has the rates of the one with the nearest bits, and below four bits fewer bytes a second:
    codes take longer to unpack. The errors are those of each report, predicted from the others.

    Args:
        reports: at least one with an answer.
    """
    known = {report.type.name: report.type for report in reports} | {each.name: each for each in types}
    layer = _layer_seconds(reports)
    reads, computes = _reads(reports, layer), _computes(reports)
    prompts = bool(computes)
    if not prompts:
        computes = _computes([replace(report, prompt=report.answer) for report in reports])
    largest = max(report.nbytes for report in reports)
    rates = {name: MatrixSpeed(largest, _read(each, reads), _compute(each, computes)) for name, each in known.items()}
    # Caches are read as matrices are; their own type has more bits than any.
    caches = {name: CacheSpeed(rate.read, rate.compute) for name, rate in rates.items()}
    own = caches[max(known, key=lambda name: known[name].bits_per_weight)]
    predicted = list(left_out(reports))
    return RuntimeSpeed(
        version="reported",
        matrices={name: (rate,) for name, rate in rates.items()},
        token_seconds=0.0,
        layers=(LayerSpeed(largest, layer),),
        width_seconds=0.0,
        cache_read=own.read,
        attention=own.attention,
        head_share=0.0,
        caches=caches,
        prompt_error=_error(each.prompt for each in predicted) if prompts else None,
        answer_error=_error(each.answer for each in predicted),
        layer_error=0.0 if _tell_overhead(reports) else _USUAL_ERROR,
        smallest=min(report.model.weights for report in reports),
        prompts=prompts,
    )


@dataclass(frozen=True)
class LeftOut:
    """A report, and its speeds predicted from the others of its chip and runtime over what was measured.

    Attributes:
        prompt, answer: ``None``: it has no such speed, or no other has one.
    """

    report: SpeedReport
    prompt: float | None
    answer: float | None


def left_out(reports: Sequence[SpeedReport]) -> Iterator[LeftOut]:
    """Predict each report from the others."""
    for index, report in enumerate(reports):
        others = [*reports[:index], *reports[index + 1 :]]
        prompt = answer = None
        if report.prompt is not None and any(other.prompt for other in others):
            prompt = _compute(report.type, _computes(others)) / (2 * report.model.weights) / report.prompt
        if report.answer is not None and any(other.answer for other in others):
            layer = _layer_seconds(others)
            seconds = report.nbytes / _read(report.type, _reads(others, layer)) + report.model.layers * layer
            answer = 1 / seconds / report.answer
        yield LeftOut(report, prompt, answer)


def _error(ratios: Iterable[float | None]) -> float:
    """Return how far off predictions may be, as a share, from predicted over measured; ``None``: nothing to compare."""
    known = [abs(log(ratio)) for ratio in ratios if ratio is not None]
    return max(LEAST_ERROR, exp(max(known)) - 1) if known else _ALONE_ERROR


def _layer_seconds(reports: Sequence[SpeedReport]) -> float:
    """Return what a layer takes beside reading: what makes models of several sizes agree best on their types' rates."""
    shortest = min(1 / report.answer / report.model.layers for report in reports if report.answer)
    if not _tell_overhead(reports):
        return min(_USUAL_LAYER_SECONDS, _USUAL_OVERHEAD * shortest)

    def disagreement(layer: float) -> float:
        return sum(
            (log(rate) - sum(map(log, rates)) / len(rates)) ** 2
            for rates in _reads(reports, layer).values()
            for rate in rates
        )

    return min((seconds for seconds in _LAYER_SECONDS if seconds <= _MOST_OVERHEAD * shortest), key=disagreement)


def _tell_overhead(reports: Sequence[SpeedReport]) -> bool:
    """Whether models of one type have answered whose layers differ enough in size."""
    sizes: dict[WeightType, list[float]] = {}
    for report in reports:
        if report.answer is not None:
            sizes.setdefault(report.type, []).append(report.nbytes / report.model.layers)
    return any(max(each) >= _ALIKE * min(each) for each in sizes.values())


def _reads(reports: Sequence[SpeedReport], layer: float) -> dict[WeightType, list[float]]:
    """Return bytes a second of each report with an answer, by type."""
    reads: dict[WeightType, list[float]] = {}
    for report in reports:
        if report.answer is not None:
            seconds = 1 / report.answer - report.model.layers * layer
            reads.setdefault(report.type, []).append(report.nbytes / seconds)
    return reads


def _computes(reports: Sequence[SpeedReport]) -> dict[WeightType, list[float]]:
    """Return operations a second of each report with a prompt, by type."""
    computes: dict[WeightType, list[float]] = {}
    for report in reports:
        if report.prompt is not None:
            computes.setdefault(report.type, []).append(2 * report.model.weights * report.prompt)
    return computes


def _read(type_: WeightType, reads: Mapping[WeightType, Sequence[float]]) -> float:
    """Return bytes of a type a second: below four bits midway between as many bytes and as many weights."""
    near = _nearest(type_, reads)
    fewer = min(1.0, type_.bits_per_weight / min(near.bits_per_weight, _FOUR_BITS))
    return _mean(reads[near]) * sqrt(fewer)


def _compute(type_: WeightType, computes: Mapping[WeightType, Sequence[float]]) -> float:
    """Return operations a second with a type."""
    return _mean(computes[_nearest(type_, computes)])


def _nearest(type_: WeightType, known: Mapping[WeightType, object]) -> WeightType:
    """Return the type itself, or the one with the nearest bits; of two as near, the one with more."""
    return min(
        known,
        key=lambda each: (
            each != type_,
            abs(log(each.bits_per_weight / type_.bits_per_weight)),
            -each.bits_per_weight,
        ),
    )


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return exp(sum(map(log, values)) / len(values))
