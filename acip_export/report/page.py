"""The figures of a report page. Pure, but for :func:`read_export`.

Everything that moves with the size slider is a list of :class:`Size`: plans at other budgets, and exports that were
made and measured. It is embedded in the page as JSON, from which a later run can read it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from acip_export.artifacts.document import Artifact, decode_artifact
from acip_export.artifacts.export_directory import export_of, load_export_plan
from acip_export.artifacts.names import PAGE_DATA, REPORT_FILE, ArtifactName
from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.artifacts.report import Report, load_report
from acip_export.artifacts.scores import RankedOn, Setting
from acip_export.errors import InputError
from acip_export.inspection.anatomy import fact
from acip_export.io.inputs import Count, Finite, NotNegative, PositiveFloat, ReadOnly, Share
from acip_export.model.tensor_names import layer_of, within_layer, without_numbers
from acip_export.weight_types import weight_type

# Ratios of the ranked layers' parameters -> for each, the share of components that the ranking keeps, by module.
ScoreMap = Callable[[Sequence[float]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Exported:
    """An export as its own files describe it.

    Attributes:
        plan: its ``plan.json``. report: its ``report.json``, ``None`` where it was never verified.
    """

    plan: Plan
    report: Report | None


@dataclass(frozen=True)
class Ranking(ReadOnly):
    """What a score file says about itself: see :class:`acip_export.artifacts.scores.ScoreFile`.

    Attributes:
        curve: ``(ratio, loss, loss with adapters or None)``, nats per token.
        license: of the base model, as its card names it, or empty. hub: its Hugging Face id, or empty.
    """

    algorithm: Mapping[str, Setting]
    data: RankedOn
    versions: Mapping[str, str]
    curve: tuple[tuple[Share, Finite, Finite | None], ...]
    license: str = ""
    hub: str = ""


@dataclass(frozen=True)
class Cell:
    """One matrix at one size: bytes, its stored types in words, its rank (0: dense)."""

    nbytes: int
    types: str
    rank: int


@dataclass(frozen=True)
class Size:
    """One planned size, all figures in bytes unless said otherwise.

    Attributes:
        files, memory: as planned; the runtime itself is part of the memory if the budget covers it. used: what counts
            against the budget. budget: as asked. loss: predicted, nats per token above the dense model.
        perplexity: predicted on the planner's own text; ``None`` for models without one.
        ratio: files over the dense model's weights. breakdown: ``(purpose, bytes, whether the budget counts it)``.
        vectors: norms and biases. overhead: bytes of the files that are no numbers. cells: one per matrix.
        ranking_ratio: bytes of the ranked layers over those of their 16-bit weights, at most 1. ranking: the share of
            each matrix's components that the ranking alone keeps at this ratio, ``None`` for matrices without scores;
            both ``None`` where there is no score file.
    """

    files: int
    memory: int
    used: int
    budget: int
    loss: float
    perplexity: float | None
    ratio: float
    note: str
    breakdown: tuple[tuple[str, int, bool], ...]
    vectors: int
    overhead: int
    cells: tuple[Cell, ...]
    ranking_ratio: float | None = None
    ranking: tuple[float | None, ...] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Two plans of one model and layout with the same bytes count as one size."""
        return self.files, self.used


@dataclass(frozen=True)
class Measured:
    """Quality of an export in its runtime; ``low`` and ``high`` are one standard error away, ``None`` without one."""

    point: Count
    runtime: str
    perplexity: PositiveFloat
    low: NotNegative | None
    high: NotNegative | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A :class:`Size` in the page's JSON.

    Attributes:
        shown: the perplexity that the curve is drawn at. cells: bytes, position of the types in the page's, rank.
    """

    files: Count
    memory: Count
    used: Count
    budget: Count
    loss: Finite
    perplexity: PositiveFloat | None
    ratio: NotNegative
    note: str
    breakdown: tuple[tuple[str, Count, bool], ...]
    vectors: Count
    overhead: int
    cells: tuple[tuple[Count, Count, Count], ...]
    ranking_ratio: NotNegative | None = None
    ranking: tuple[Share | None, ...] | None = None
    shown: PositiveFloat | None


@dataclass(frozen=True)
class PageData(Artifact):
    """What a page embeds; types are positions in a list, or a 7B model's page would be large."""

    NAME: ClassVar[ArtifactName] = PAGE_DATA

    model: str
    fingerprint: str
    format: str
    layout: str
    scope: str
    unit: str
    own: Count
    tensors: tuple[tuple[str, Annotated[int, Meta(ge=-1)], str, Count, Count], ...]
    types: tuple[tuple[str, NotNegative], ...]
    points: tuple[Point, ...]
    measured: tuple[Measured, ...]
    dense: PositiveFloat | None
    ranking: Ranking | None


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        own: the export that the page is about. sizes: smallest first; ``own_size`` is its position.
        matrices: ``(name, layer or -1, kind, rows, columns)``. bits: of each type that occurs.
        dense_perplexity: measured on the text of the measured figures.
    """

    own: Exported
    sizes: tuple[Size, ...]
    own_size: int
    matrices: tuple[tuple[str, int, str, int, int], ...]
    bits: Mapping[str, float]
    measured: tuple[Measured, ...]
    dense_perplexity: float | None
    ranking: Ranking | None

    def predicted(self, size: Size) -> float | None:
        """Perplexity on the text of the measured figures where there is one, else on the planner's."""
        if size.perplexity is None:
            return None
        return size.perplexity if self.dense_perplexity is None else self.dense_perplexity * exp(min(size.loss, 300.0))

    def data(self) -> PageData:
        """What the page embeds."""
        types = sorted(self.bits, key=lambda name: (-self.bits[name], name))
        position = {name: index for index, name in enumerate(types)}
        plan = self.own.plan
        return PageData(
            model=plan.model,
            fingerprint=plan.model_fingerprint,
            format=plan.format,
            layout=plan.layout,
            scope=plan.budget_scope,
            unit=plan.loss_unit,
            own=self.own_size,
            tensors=self.matrices,
            types=tuple((name, self.bits[name]) for name in types),
            points=tuple(self._point(size, position) for size in self.sizes),
            measured=self.measured,
            dense=self.dense_perplexity,
            ranking=self.ranking,
        )

    def _point(self, size: Size, position: Mapping[str, int]) -> Point:
        fields: dict[str, Any] = vars(size).copy()
        fields["cells"] = tuple((cell.nbytes, position[cell.types], cell.rank) for cell in size.cells)
        fields["ranking"] = size.ranking and tuple(None if r is None else round(r, 3) for r in size.ranking)
        return Point(**fields, shown=self.predicted(size))


def read_export(path: Path) -> Exported:
    """An export directory, or the ``report.json`` (or ``plan.json``) in it.

    Raises:
        PlanFileError: no readable plan. InputError: a damaged report, one of another version or another export.
    """
    root = export_of(path)
    plan = load_export_plan(root)
    file = root / REPORT_FILE
    if not file.exists():
        return Exported(plan, None)
    report = load_report(file)
    if report.planned_bytes != plan.planned_bytes:
        raise InputError(f"{file} is not of the plan beside it; run  acip-export verify  again")
    return Exported(plan, report)


def build_page(
    own: Exported,
    others: Sequence[Exported] = (),
    sizes: Sequence[Plan] = (),
    ranking: Ranking | None = None,
    score_map: ScoreMap | None = None,
    before: PageData | None = None,
) -> Page:
    """Everything for one page.

    Args:
        others: measured exports of the same model, format and layout. sizes: plans of it that were not exported.
        score_map: see :data:`ScoreMap`. before: what an earlier page embedded; used for what is not given.

    Raises:
        InputError: an export or plan is of another model, format or layout.
    """
    for plan in (*(other.plan for other in others), *sizes):
        _same_page(own.plan, plan)
    usable = before if before is not None and _fits(before, own.plan) else None
    found: dict[tuple[int, int], Size] = {}
    if usable is not None and not sizes:
        found |= {size.key: size for size in _sizes_before(usable)}
    plans = (*sizes, *(other.plan for other in others), own.plan)
    for plan in plans:
        old = found.get(_key(plan))
        size = size_of(plan)
        found[_key(plan)] = size if old is None else replace(size, ranking_ratio=old.ranking_ratio, ranking=old.ranking)
    ordered = tuple(sorted(found.values(), key=lambda size: (size.used, size.files, -size.loss)))
    matrices = tuple(_matrix(d) for d in own.plan.tensors if len(d.shape) == 2)
    if score_map is not None:
        ordered = _with_ranking(ordered, matrices, score_map)
    where = {size.key: index for index, size in enumerate(ordered)}
    measured = {where[_key(e.plan)]: m for e in (*others, own) if (m := _measured(e, where[_key(e.plan)])) is not None}
    dense = next((d for e in (own, *others) if (d := _dense(e)) is not None), None)
    if usable is not None and usable.dense == dense:  # the same text
        measured = {m.point: m for m in _measured_before(usable, where)} | measured
    bits = {cell.types: _bits(own.plan.format, cell.types) for size in ordered for cell in size.cells}
    if ranking is None and usable is not None:
        ranking = usable.ranking
    return Page(
        own,
        ordered,
        where[_key(own.plan)],
        matrices,
        bits,
        tuple(measured[index] for index in sorted(measured)),
        dense,
        None if ranking is None else replace(ranking, data=_by_name(ranking.data)),
    )


def _by_name(ranked_on: RankedOn) -> RankedOn:
    """A page is for others: of the paths of texts they get the names."""
    evaluation = ranked_on.evaluation and PurePath(ranked_on.evaluation).name
    return replace(ranked_on, source=PurePath(ranked_on.source).name, evaluation=evaluation)


def _with_ranking(
    sizes: tuple[Size, ...], matrices: Sequence[tuple[str, int, str, int, int]], score_map: ScoreMap
) -> tuple[Size, ...]:
    ranked = set(score_map([1.0])[0])
    inside = [index for index, matrix in enumerate(matrices) if matrix[0] in ranked]
    dense = sum(2 * matrices[index][3] * matrices[index][4] for index in inside)
    ratios = [min(1.0, sum(size.cells[index].nbytes for index in inside) / dense) for size in sizes]
    return tuple(
        replace(size, ranking_ratio=ratio, ranking=tuple(kept.get(matrix[0]) for matrix in matrices))
        for size, ratio, kept in zip(sizes, ratios, score_map(ratios), strict=True)
    )


def size_of(plan: Plan) -> Size:
    """A plan's figures, without what no page shows."""
    matrices = [d for d in plan.tensors if len(d.shape) == 2]
    vectors = sum(d.nbytes for d in plan.tensors if len(d.shape) != 2)
    return Size(
        files=plan.planned_bytes,
        memory=plan.memory_bytes if plan.budget_scope == "file" else plan.used_bytes,
        used=plan.used_bytes,
        budget=plan.budget_bytes,
        loss=plan.predicted_loss,
        perplexity=plan.predicted_perplexity,
        ratio=plan.size_ratio,
        note=" ".join(f"{note[0].upper()}{note[1:]}." for note in plan.notes if note),
        breakdown=tuple(
            (name.replace("_", " "), size, plan.counted(name) > 0) for name, size in plan.breakdown.items()
        ),
        vectors=vectors,
        overhead=plan.planned_bytes - vectors - sum(d.nbytes for d in matrices),
        cells=tuple(Cell(d.nbytes, _types(d), d.rank or 0) for d in matrices),
    )


def _key(plan: Plan) -> tuple[int, int]:
    return plan.planned_bytes, plan.used_bytes


def _dense(export: Exported) -> float | None:
    dense = None if export.report is None else export.report.dense_perplexity
    return None if dense is None else dense.perplexity


def _measured(export: Exported, point: int) -> Measured | None:
    measured = None if export.report is None else export.report.perplexity
    if measured is None:
        return None
    runtime, perplexity = measured
    value, error = perplexity.perplexity, perplexity.standard_error
    # Beside the dense model, what counts is the error of the difference: both were measured on the same tokens.
    if runtime.divergence is not None:
        error = runtime.divergence.loss_difference_standard_error or error
    return Measured(point, fact(runtime.runtime), value, value * exp(-error), value * exp(error))


def _matrix(decision: TensorDecision) -> tuple[str, int, str, int, int]:
    """Experts and the like are further numbers in a name; they share a column of the heat map."""
    module, layer = decision.module, layer_of(decision.module)
    rows, columns = decision.shape
    if layer is None:
        return fact(module), -1, fact(module.rpartition(".")[2]), rows, columns
    return fact(module), layer, fact(without_numbers(within_layer(module))), rows, columns


def _types(decision: TensorDecision) -> str:
    if decision.rank is None:
        return str(decision.type)
    down, up = str(decision.down_type), str(decision.up_type)
    return down if down == up else f"{down}·{up}"


def _bits(format_name: str, types: str) -> float:
    """Per stored number; of a pair the mean."""
    names = types.split("·")
    return sum(weight_type(format_name, name).bits_per_weight for name in names) / len(names)


def _same_page(own: Plan, other: Plan) -> None:
    mine, theirs = (
        (p.model, p.model_fingerprint[:12], f"{p.format} {p.layout}", f"budget of {p.budget_scope}")
        for p in (own, other)
    )
    if mine != theirs:
        raise InputError(
            f"one report shows one model, layout and kind of budget: {', '.join(mine)}.\n"
            f"Here is also {', '.join(theirs)}; make a report of its own for it"
        )


_ISLAND = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def embedded(html: str) -> PageData | None:
    """What a page made by this version embeds; ``None`` for any other text."""
    match = _ISLAND.search(html)
    if match is None:
        return None
    try:
        return decode_artifact(match[1].encode("utf-8", "replace"), PageData, "the page", InputError)
    except InputError:
        return None


def _fits(before: PageData, plan: Plan) -> bool:
    """Whether an earlier page is of the same thing, and whole."""
    expected = (plan.model_fingerprint, plan.format, plan.layout, plan.budget_scope)
    matrices = sum(len(d.shape) == 2 for d in plan.tensors)
    return (
        (before.fingerprint, before.format, before.layout, before.scope) == expected
        and all(len(point.cells) == matrices for point in before.points)
        and all(point.ranking is None or len(point.ranking) == matrices for point in before.points)
        and all(kind < len(before.types) for point in before.points for _, kind, _ in point.cells)
        and all(measured.point < len(before.points) for measured in before.measured)
    )


def _sizes_before(data: PageData) -> list[Size]:
    sizes = []
    for point in data.points:
        fields = vars(point).copy()
        del fields["shown"]
        fields["cells"] = tuple(Cell(size, data.types[kind][0], rank) for size, kind, rank in point.cells)
        sizes.append(Size(**fields))
    return sizes


def _measured_before(data: PageData, where: Mapping[tuple[int, int], int]) -> list[Measured]:
    places = [where.get((point.files, point.used)) for point in data.points]
    kept = [(places[measured.point], measured) for measured in data.measured]
    return [replace(measured, point=place) for place, measured in kept if place is not None]
