"""The whole curve of sizes against predicted quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import Plan
from acip_export.errors import AcipError
from acip_export.planning.planner import PlanRequest, Problem
from acip_export.planning.presets import preset
from acip_export.progress import Progress, ProgressCallback, silent

# Beyond this many tensors the exact finish costs more time than it moves a point of the curve.
_EXACT_TENSORS = 100
# Prompts in batches of the same size at every budget: a curve must not bend because prompts become faster.
_PROMPT_BATCH = 32
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a curve; ``used_bytes`` in the sweep's scope."""

    used_bytes: int
    planned_bytes: int
    predicted_loss: float
    predicted_perplexity: float | None
    low_rank_layers: int


@dataclass(frozen=True)
class SweepLine:
    """``points`` by growing bytes and falling loss. ``presets``: one type for everything, by name."""

    label: str
    format: str
    layout: str
    types: tuple[str, ...]
    points: tuple[SweepPoint, ...]
    presets: dict[str, SweepPoint]


def sweep(
    problem: Problem,
    request: PlanRequest,
    label: str,
    steps: int = 40,
    progress: ProgressCallback = silent,
) -> SweepLine:
    """Plans from the smallest feasible budget to the last one that improves anything, ``steps`` of them.

    All share the candidates. Sizes grow by equal factors: most of what happens to quality happens at the small ones.

    Args:
        request: its budget is not read.

    Raises:
        UsageError, UnsupportedError: as :func:`acip_export.planning.make_plan`.
    """
    request = _same_batch(problem, request)
    exact = len(problem.candidates) <= _EXACT_TENSORS
    smallest, _ = problem.floor(replace(request, budget_bytes=_NO_LIMIT))
    largest = problem.plan(replace(request, budget_bytes=_NO_LIMIT), exact=False).used_bytes
    points: list[SweepPoint] = []
    for step, budget in enumerate(_budgets(smallest, largest, steps)):
        point = _point(problem.plan(replace(request, budget_bytes=budget), exact=exact))
        if not points or point.predicted_loss < points[-1].predicted_loss:
            points.append(point)
        progress(Progress(label, step + 1, steps))
    return SweepLine(label, problem.format.name, problem.layout.name, request.types, tuple(points), {})


def preset_points(problem: Problem, request: PlanRequest) -> dict[str, SweepPoint]:
    """The target's types one by one, evaluated by the same predictor; types that no matrix can take are left out."""
    request = _same_batch(problem, request)
    found: dict[str, SweepPoint] = {}
    for form in problem.format.choose_types(request.types):
        try:
            plan = preset(problem, form.name).plan(replace(request, budget_bytes=_NO_LIMIT), exact=False)
        except AcipError:
            continue
        if any(decision.type == form.name and len(decision.shape) == 2 for decision in plan.tensors):
            found[form.name] = _point(plan)
    return found


def _same_batch(problem: Problem, request: PlanRequest) -> PlanRequest:
    if request.prompt_batch is not None or not problem.checkpoint.shape.generates:
        return request
    serving, _ = problem.settings(replace(request, budget_bytes=_NO_LIMIT))
    return replace(request, prompt_batch=min(_PROMPT_BATCH, serving.context))


def _budgets(smallest: int, largest: int, steps: int) -> Iterator[int]:
    for step in range(steps):
        share = step / (steps - 1)
        yield min(max(round(smallest ** (1 - share) * largest**share), smallest), largest) if share < 1 else largest


def _point(plan: Plan) -> SweepPoint:
    low_rank = sum(decision.rank is not None for decision in plan.tensors)
    return SweepPoint(plan.used_bytes, plan.planned_bytes, plan.predicted_loss, plan.predicted_perplexity, low_rank)
