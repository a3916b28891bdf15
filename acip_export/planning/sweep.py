"""The whole curve of sizes against predicted quality."""

from __future__ import annotations

from collections.abc import Iterator
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
# Prompts in batches of the same size at every budget: a curve must not bend because prompts become faster.
_PROMPT_BATCH = 32


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a curve; ``used_bytes`` in the sweep's scope, ``speed`` where the machine was measured."""

    used_bytes: int
    planned_bytes: int
    predicted_loss: float
    predicted_perplexity: float | None
    low_rank_layers: int
    speed: PlannedSpeed | None = None


@dataclass(frozen=True)
class SweepLine:
    """The plans of one search space.

    Attributes:
        types: names of the weight types that plans chose from.
        points: by growing bytes and falling loss.
        presets: one type for everything, by name.
    """

    label: str
    format: str
    layout: str
    types: tuple[str, ...]
    points: tuple[SweepPoint, ...]
    presets: dict[str, SweepPoint]


def sweep(
    problem: Problem,
    rule: ServingRule,
    scope: BudgetScope,
    label: str,
    steps: int = 40,
    progress: ProgressCallback = silent,
    pace: Pace | None = None,
) -> SweepLine:
    """Plan for the smallest feasible budget, for the last one that improves anything, and between: ``steps`` of them.

    All share the candidates. Sizes grow by equal factors: most of what happens to quality happens at the small ones.

    Args:
        label: names the line; progress is told under it. pace: to predict speeds with.

    Raises:
        UnsupportedError: the format's converter cannot express a decision.
    """
    serving = rule.at_every_budget(_PROMPT_BATCH)
    exact = len(problem.candidates) <= _EXACT_TENSORS
    smallest, largest = problem.floor(scope, serving).nbytes, problem.largest(scope, serving).used_bytes
    points: list[SweepPoint] = []
    for step, nbytes in enumerate(_sizes(smallest, largest, steps)):
        point = _point(with_speed(problem, problem.plan(Budget(nbytes, scope), serving, exact=exact), pace))
        if not points or point.predicted_loss < points[-1].predicted_loss:
            points.append(point)
        progress(Progress(label, step + 1, steps))
    space = problem.space
    types = tuple(type_.name for type_ in space.types)
    return SweepLine(label, space.format.name, space.layout.name, types, tuple(points), {})


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
    predicted = plan.predicted_loss, plan.predicted_perplexity
    return SweepPoint(plan.used_bytes, plan.planned_bytes, *predicted, low_rank, plan.speed)
