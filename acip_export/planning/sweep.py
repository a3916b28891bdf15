"""Plan for every size: the curve of predicted quality against bytes, weights and KV cache together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from acip_export.artifacts.plan import BudgetScope, Plan, PlannedSpeed
from acip_export.errors import UnsupportedError
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.presets import preset
from acip_export.planning.problem import Problem
from acip_export.planning.speed import Pace, with_speed
from acip_export.progress import Progress, ProgressCallback, silent

# Beyond this many tensors the exact finish costs more time than it moves a point of the curve.
_EXACT_TENSORS = 100
# The same batch of prompts at every budget: a curve must not bend because prompts become faster. A small one takes
# little from the smallest budgets.
_PROMPT_BATCH = 32


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a curve.

    Attributes:
        used_bytes: what the plan takes of a budget of the sweep's scope (docs/memory.md).
        planned_bytes: bytes of the files.
        predicted_loss: in the unit of the model's task, above the dense model.
        predicted_perplexity: ``None`` for encoders.
        low_rank_layers: how many matrices are stored as pairs.
        speed: predicted tokens per second, where the machine was measured.
        cache_type_k: type of the KV cache's keys. cache_type_v: of its values.
    """

    used_bytes: int
    planned_bytes: int
    predicted_loss: float
    predicted_perplexity: float | None
    low_rank_layers: int
    cache_type_k: str
    cache_type_v: str
    speed: PlannedSpeed | None = None


@dataclass(frozen=True)
class SweepLine:
    """The plans of one search space.

    Attributes:
        label: the name of the line in a drawing.
        format: the file format.
        layout: the layout of the format.
        types: names of the weight types that plans chose from.
        context: tokens of the context that plans are for.
        points: the plans, by growing bytes and falling loss.
        presets: by name of a type, the plan that has everything in it.
    """

    label: str
    format: str
    layout: str
    types: tuple[str, ...]
    context: int
    points: tuple[SweepPoint, ...]
    presets: dict[str, SweepPoint]


def sweep(
    problem: Problem,
    rules: Sequence[ServingRule],
    scope: BudgetScope,
    label: str,
    steps: int = 40,
    progress: ProgressCallback = silent,
    pace: Pace | None = None,
) -> SweepLine:
    """Plan for ``steps`` budgets, from the smallest feasible one to the last that improves anything.

    Budgets grow by equal factors, since quality changes most at small sizes. A plan that is predicted to be no better
    than the one before is left out.

    Args:
        problem: the model, its scores and the search space.
        rules: the serving settings that each plan chooses from: of one context, with several types of KV cache.
        scope: what budgets cover.
        label: the name of the line, and of the stage in progress reports.
        steps: how many budgets, the first and the last included.
        progress: is called after each plan.
        pace: the machine's speeds, if they were measured; plans then have a predicted speed.

    Raises:
        UnsupportedError: the format's converter cannot express a decision.
    """
    servings = [rule.at_every_budget(_PROMPT_BATCH) for rule in rules]
    exact = len(problem.candidates) <= _EXACT_TENSORS
    floors = [problem.floor(scope, serving).nbytes for serving in servings]
    smallest, largest = min(floors), max(problem.largest(scope, serving).used_bytes for serving in servings)
    points: list[SweepPoint] = []
    for step, nbytes in enumerate(_sizes(smallest, largest, steps)):
        feasible = [serving for serving, floor in zip(servings, floors, strict=True) if floor <= nbytes]
        plans = [problem.plan(Budget(nbytes, scope), serving, exact=exact) for serving in feasible]
        best = min(plans, key=lambda plan: plan.predicted_loss)
        point = _point(with_speed(problem, best, pace))
        if not points or point.predicted_loss < points[-1].predicted_loss:
            points.append(point)
        progress(Progress(label, step + 1, steps))
    space = problem.space
    types = tuple(type_.name for type_ in space.types)
    return SweepLine(label, space.format.name, space.layout.name, types, servings[0].context, tuple(points), {})


def preset_points(
    problem: Problem, rule: ServingRule, scope: BudgetScope, pace: Pace | None = None
) -> dict[str, SweepPoint]:
    """Evaluate the problem's types one by one, by the same predictor; types that no matrix can take are left out."""
    serving = rule.at_every_budget(_PROMPT_BATCH)
    points: dict[str, SweepPoint] = {}
    for type_ in problem.space.types:
        try:
            plan = preset(problem, type_).largest(scope, serving)
        except UnsupportedError:
            continue
        if any(decision.type == type_.name and len(decision.shape) == 2 for decision in plan.tensors):
            points[type_.name] = _point(with_speed(problem, plan, pace))
    return points


def _sizes(smallest: int, largest: int, steps: int) -> Iterator[int]:
    for step in range(steps):
        share = step / (steps - 1)
        yield min(max(round(smallest ** (1 - share) * largest**share), smallest), largest) if share < 1 else largest


def _point(plan: Plan) -> SweepPoint:
    low_rank = sum(decision.rank is not None for decision in plan.tensors)
    return SweepPoint(
        plan.used_bytes,
        plan.planned_bytes,
        plan.predicted_loss,
        plan.predicted_perplexity,
        low_rank,
        plan.serving.cache_type_k,
        plan.serving.cache_type_v,
        plan.speed,
    )
