"""How fast a plan will be: bytes read over bandwidth for an answer, operations over their rate for a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, sqrt

from acip_export.artifacts.plan import Plan, PlannedSpeed, Serving, TensorDecision
from acip_export.artifacts.speeds import RuntimeSpeed
from acip_export.errors import UnreachableSpeedError
from acip_export.formats.protocol import ExportFormat
from acip_export.model.shape import ModelShape
from acip_export.model.tensor_names import HEAD, is_embedding
from acip_export.planning.budget import Budget
from acip_export.planning.candidates import Candidates
from acip_export.planning.problem import DoesNotFit, Problem
from acip_export.units import format_speed
from acip_export.weight_types import weight_type

# How often a budget is halved in the search for one whose plan is fast enough.
_HALVINGS = 10


@dataclass(frozen=True)
class Pace:
    """Speeds of a runtime to predict with, and the fewest tokens a second that an answer may have; ``None``: any."""

    runtime: str
    speeds: RuntimeSpeed
    least: float | None = None


@dataclass(frozen=True)
class Product:
    """A matrix that tokens are multiplied with. ``head``: that of a prompt's last token alone, in some runtimes."""

    type: str
    nbytes: int
    weights: int
    head: bool


@dataclass(frozen=True)
class Predictor:
    """Predicts the speed of plans for one model in one runtime."""

    format: ExportFormat
    shape: ModelShape
    runtime: str
    speeds: RuntimeSpeed
    serving: Serving

    @classmethod
    def of(cls, problem: Problem, pace: Pace, serving: Serving) -> Predictor:
        """Return the predictor for a problem's plans with one serving."""
        return cls(problem.space.format, problem.checkpoint.shape, pace.runtime, pace.speeds, serving)

    @cached_property
    def cache_seconds(self) -> float:
        """The time of reading the cache of the whole context: of keys and values each in its type."""
        types = self.serving.cache_type_k, self.serving.cache_type_v
        bits = [numerator / denominator for numerator, denominator in map(self.format.cache_types.__getitem__, types)]
        nbytes = self.format.memory.serving(self.shape, self.serving).kv_cache
        rates = [self.speeds.cache(name).read for name in types]
        return sum(nbytes * each / sum(bits) / rate for each, rate in zip(bits, rates, strict=True))

    @cached_property
    def attention_seconds(self) -> float:
        """The time of attention for one token of a prompt as long as the context: products with keys, then values."""
        operations = 2 * self.shape.heads * self.shape.head_dim * self.serving.context * self.shape.layers
        types = self.serving.cache_type_k, self.serving.cache_type_v
        return sum(operations / 2 / self.speeds.cache(name).attention for name in types)

    def speed(self, decisions: Sequence[TensorDecision]) -> PlannedSpeed | None:
        """Return tokens a second with a full context; ``None``: a type was not measured."""
        speeds, shape, serving = self.speeds, self.shape, self.serving
        matrices = [matrix for decision in decisions for matrix in self.products(decision)]
        types = {matrix.type for matrix in matrices}
        if not types <= speeds.matrices.keys():
            return None
        nbytes = sum(matrix.nbytes for matrix in matrices)
        of = {type_: speeds.matrix(type_, nbytes) for type_ in types}
        read = sum(matrix.nbytes / of[matrix.type].read for matrix in matrices)
        computed = sum(
            (speeds.head_share if matrix.head else 1.0) * 2 * matrix.weights / of[matrix.type].compute
            for matrix in matrices
        )
        fixed = speeds.token_seconds + shape.layers * speeds.layer_seconds(nbytes)
        answer = fixed + read + self.cache_seconds
        overhead = fixed / serving.prompt_batch
        width = shape.layers * shape.hidden * speeds.width_seconds
        prompt = 1 / (computed + self.attention_seconds + overhead + width) if speeds.prompts else None
        weights = sum(matrix.weights for matrix in matrices if not matrix.head)
        smaller = max(1.0, speeds.smallest / max(1, weights))
        return PlannedSpeed(
            self.runtime,
            prompt,
            1 / answer,
            _error(speeds.prompt_error, smaller),
            _error(speeds.answer_error, smaller, fixed / answer, speeds.layer_error),
        )

    def products(self, decision: TensorDecision) -> Iterator[Product]:
        """Yield every matrix of a tensor that a token is multiplied with."""
        return products(decision, self.format.name, self.shape)


def _error(known: float | None, smaller: float, overhead: float = 0.0, overhead_error: float = 0.0) -> float | None:
    """Return how far off a speed may be, as a share.

    Args:
        known: of models as large as those that were timed. smaller: by so much the model is smaller than all of them.
        overhead: its share of the time, known to ``overhead_error``.
    """
    if known is None:
        return None
    uncertain = max(1 + overhead_error * overhead, 1 / (1 - overhead)) if overhead_error else 1.0
    # A small model keeps less of a processor busy: what one computes a second grows about with the root of its size.
    return (1 + known) * sqrt(smaller) * uncertain - 1


def products(decision: TensorDecision, format: str, shape: ModelShape) -> Iterator[Product]:
    """Yield every matrix of a tensor that a token is multiplied with."""
    head = is_embedding(decision.name)
    if len(decision.shape) != 2 or (head and not shape.tied_embeddings):
        return
    rows, columns = decision.shape
    head = head or decision.name.endswith(HEAD)
    stored: list[tuple[str | None, int, int]] = []
    if decision.representation != "factored":
        stored.append((decision.type, rows, columns))
    if decision.rank:
        stored += [(decision.down_type, decision.rank, columns), (decision.up_type, rows, decision.rank)]
    for name, height, width in stored:
        if name is not None:
            yield Product(name, weight_type(format, name).nbytes(height, width), height * width, head)


def with_speed(problem: Problem, plan: Plan, pace: Pace | None) -> Plan:
    """Return ``plan`` with its predicted speed, where that is known."""
    if pace is None or not problem.checkpoint.shape.generates:
        return plan
    return replace(plan, speed=Predictor.of(problem, pace, plan.serving).speed(plan.tensors))


def at_pace(problem: Problem, budget: Budget, plan: Plan, pace: Pace | None) -> Plan:
    """Return ``plan`` with its predicted speed, or, where that is less than asked for, the best found that is faster.

    What is tried are the plans of smaller budgets, and every tensor's fastest candidate.

    Raises:
        UnreachableSpeedError: not even that one is fast enough.
    """
    if pace is None or not problem.checkpoint.shape.generates:
        return plan
    predictor = Predictor.of(problem, pace, plan.serving)

    def told(found: Plan) -> Plan:
        return replace(found, speed=predictor.speed(found.tensors))

    def fast_enough(found: Plan) -> bool:
        speed = predictor.speed(found.tensors)
        return speed is not None and pace.least is not None and speed.answer >= pace.least

    if pace.least is None or fast_enough(plan):
        return told(plan)
    fastest = _fastest_plan(problem, predictor, budget)
    if not fast_enough(fastest):
        raise _unreachable(predictor, fastest, pace.least)
    best, low, high = fastest, problem.floor(budget.scope, plan.serving).nbytes, plan.used_bytes
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        found = problem.plan(Budget(middle, budget.scope), plan.serving, exact=False)
        if fast_enough(found):
            best, low = min(best, found, key=lambda each: each.predicted_loss), middle
        else:
            high = middle
    certificate = replace(
        best.certificate,
        bytes_left=budget.nbytes - best.used_bytes,
        lower_bound=min(plan.certificate.lower_bound, best.predicted_loss),
        next_upgrade=None,
        next_upgrade_bytes=None,
        quantization_only_loss=None,
    )
    left = budget.nbytes - best.used_bytes
    note = f"--min-speed {pace.least:g} leaves {left:,} bytes of the budget: what they would buy is slower"
    return told(replace(best, budget_bytes=budget.nbytes, certificate=certificate, notes=(*best.notes, note)))


def check_pace(problem: Problem, budget: Budget, serving: Serving, pace: Pace | None) -> None:
    """Refuse a speed that no plan has, before anything is measured that changes no speed; raises as :func:`at_pace`."""
    if pace is None or pace.least is None or not problem.checkpoint.shape.generates:
        return
    predictor = Predictor.of(problem, pace, serving)
    fastest = _fastest_plan(problem, predictor, budget)
    speed = predictor.speed(fastest.tensors)
    if speed is None or speed.answer < pace.least:
        raise _unreachable(predictor, fastest, pace.least)


def _fastest_plan(problem: Problem, predictor: Predictor, budget: Budget) -> Plan:
    """Return the plan of every tensor's fastest candidates, or, where that is too large, the smallest plan.

    Which ones are fastest depends on the bytes of the plan: at first it is taken for a small one.
    """
    nbytes = sum(int(candidates.table.stored.min()) for candidates in problem.candidates)
    first = _plan_of_fastest(problem, predictor, budget, nbytes)
    second = _plan_of_fastest(problem, predictor, budget, first.planned_bytes)

    def answer(plan: Plan) -> float:
        speed = predictor.speed(plan.tensors)
        return 0.0 if speed is None else speed.answer

    return max(first, second, key=answer)


def _plan_of_fastest(problem: Problem, predictor: Predictor, budget: Budget, nbytes: int) -> Plan:
    """Return :func:`_fastest_plan`, with the rates of a model of so many bytes."""
    serving = predictor.serving
    try:
        return _fastest(problem, predictor, nbytes).plan(budget, serving)
    except DoesNotFit:  # a type with a fast kernel may take more bytes
        return problem.plan(Budget(problem.floor(budget.scope, serving).nbytes, budget.scope), serving)


def _fastest(problem: Problem, predictor: Predictor, nbytes: int) -> Problem:
    """Return the problem with the candidates of each tensor that are read fastest in a model of so many bytes."""
    # Candidates are many: their types' rates are looked up once.
    rates = {name: predictor.speeds.matrix(name, nbytes).read for name in predictor.speeds.matrices}

    def seconds(candidates: Candidates, option: TensorDecision) -> float:
        matrices = predictor.products(replace(option, name=candidates.name))
        return sum(matrix.nbytes / rates[matrix.type] if matrix.type in rates else inf for matrix in matrices)

    least = {each.name: min(seconds(each, option) for option in each.options) for each in problem.candidates}
    return problem.only(lambda candidates, option: seconds(candidates, option) <= least[candidates.name])


def _unreachable(predictor: Predictor, fastest: Plan, least: float) -> UnreachableSpeedError:
    speed = predictor.speed(fastest.tensors)
    if speed is None:
        return UnreachableSpeedError(
            "the speed of no plan is known: its types were not measured, or not reported, there. Name others with "
            " --types  or measure them there with  acip-export calibrate",
            None,
        )
    cache = predictor.cache_seconds * speed.answer
    advice = ["name faster types with  --types"]
    if cache >= 0.05:
        advice.insert(0, f"give a shorter  --context  (reading the KV cache takes {cache:.0%} of the time)")
    reached = 0.99 * speed.answer
    return UnreachableSpeedError(
        f"no plan answers {least:g} tokens a second: the fastest is predicted with "
        f"{format_speed(speed.answer, speed.answer_error)}.\n"
        f"Ask for less with  --min-speed {reached:{'.0f' if reached >= 100 else '.3g'}},  or {', or '.join(advice)}",
        speed.answer,
    )
