"""What is known about how good a solution is, from the candidates alone."""

from __future__ import annotations

from dataclasses import dataclass

from acip_export.artifacts.plan import Certificate, Refusal, TensorDecision
from acip_export.planning.candidates import Candidates
from acip_export.planning.capacity_search import Solution, Table
from acip_export.planning.knapsack import Knapsack, pareto
from acip_export.planning.space import SearchSpace

# Of the loss, what low rank has to save to be worth a word.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Upgrade:
    """A single change that would improve a plan: the decision in words, the bytes that it takes more, the loss that it
    saves."""

    decision: str
    nbytes: int
    gain: float


def next_upgrade(table: Table, solution: Solution, left: int) -> Upgrade | None:
    """Return the change that saves most for its bytes, of those that take more than is ``left``."""
    best: Upgrade | None = None
    for candidate, choices, chosen in zip(table.candidates, table.groups, solution.allocation.chosen, strict=True):
        for other in pareto(choices):
            gain = float(choices.loss[chosen] - choices.loss[other])
            extra = int(choices.nbytes[other] - choices.nbytes[chosen])
            if gain > 0 and extra > left and (best is None or gain / extra > best.gain / best.nbytes):
                best = Upgrade(describe(candidate.decision(int(other))), extra, gain)
    return best


def loss_of_quantization_alone(table: Table, solution: Solution, left: int) -> float | None:
    """Return the summed loss of the best choice without low rank; ``None``: none takes what ``solution`` leaves."""
    dense = [~candidate.table.low_rank for candidate in table.candidates]
    if not all(mask.any() for mask in dense):
        return None
    allocation = Knapsack(table.groups, dense).solve(solution.allocation.nbytes + left, exact=False)
    return None if allocation is None else allocation.loss


def describe(decision: TensorDecision) -> str:
    """Put a decision in words: ``layers.0.mlp.up_proj: rank 128, q8_0 x q8_0``."""
    if decision.rank is None:
        return f"{decision.module}: dense {decision.type}"
    return f"{decision.module}: rank {decision.rank}, {decision.down_type} x {decision.up_type}"


def refused_types(space: SearchSpace, candidates: tuple[Candidates, ...]) -> tuple[Refusal, ...]:
    """Return the types that were allowed and that some matrices cannot take, with the reason."""
    refused: dict[tuple[str, str], list[str]] = {}
    limit = space.format.tensor_limit(space.options)
    for candidate in candidates:
        first = candidate.options[0]
        if len(first.shape) != 2:
            continue
        rows, columns = first.shape
        offered = {option.type for option in candidate.options if option.rank is None}
        for allowed in space.types:
            if allowed.name in offered:
                continue
            if not allowed.fits(columns):
                reason = f"rows of {columns} weights are no multiple of blocks of {allowed.block}"
            elif limit is not None and allowed.nbytes(rows, columns) > limit.nbytes:
                reason = limit.reason
            else:
                reason = "this format has no such embeddings, heads or tables"
            refused.setdefault((allowed.name, reason), []).append(candidate.name)
    return tuple(Refusal(name, len(tensors), tensors[0], why) for (name, why), tensors in refused.items())


def low_rank_note(
    solution: Solution, certificate: Certificate, loss: float, unit: str, *, compared: bool
) -> str | None:
    """Say in a sentence what low rank does for a plan of a layout that has it; ``None`` where it gains next to nothing.

    Args:
        loss: the plan's predicted loss, in ``unit``.
        compared: whether quantization alone was planned, for the certificate.
    """
    factored = sum(decision.rank is not None for decision in solution.decisions)
    if factored == 0:
        return "low rank does not pay at this budget: quantization alone is predicted to be better"
    if not compared:
        return f"{factored} layers are low rank"
    alone = certificate.quantization_only_loss
    if alone is None:
        return f"{factored} layers are low rank; quantization alone does not fit this budget"
    if alone - loss < _LEAST_GAIN * alone:
        return None
    return f"{factored} layers are low rank: predicted loss {loss:.3g} instead of {alone:.3g} {unit}"
