"""Plans that a prediction can hardly tell from the best one: so that the best of them can be found by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from acip_export.artifacts.plan import Plan, TensorDecision
from acip_export.model.tensor_names import layer_of
from acip_export.planning.budget import Budget
from acip_export.planning.candidates import Candidates
from acip_export.planning.planner import gaussian_note
from acip_export.planning.problem import DoesNotFit, Problem

# By how much the loss of part of the layers may be predicted wrong.
_DOUBT = 1.5
# In names of layers that mix tokens; the others mix channels.
_ATTENTION = ("attn", "attention")


def variations(problem: Problem, budget: Budget, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield plans for the same budget and serving that differ from ``plan`` and from each other, each with its change.

    Embedding and head take the neighbouring types; half of the layers counts more, or the other half; pairs are left
    out. The rest is planned anew around each change, and predicted as ``problem`` predicts.
    """
    yielded = {plan.tensors}
    for change, changed in _changed(problem, plan):
        try:
            other = changed.plan(budget, plan.serving, exact=False)
        except DoesNotFit:
            continue
        if other.tensors not in yielded:
            yielded.add(other.tensors)
            yield change, _predicted(problem, budget, plan, other)


def _changed(problem: Problem, plan: Plan) -> Iterator[tuple[str, Problem]]:
    chosen = {decision.name: decision for decision in plan.tensors}
    for candidate in problem.candidates:
        if candidate.module is None and len(candidate.options[0].shape) == 2 and len(candidate.options) > 1:
            for option in _neighbours(candidate, chosen[candidate.name]):
                yield f"{candidate.name.removesuffix('.weight')} {option.type}", _fixed(problem, candidate.name, option)
    attention = frozenset(name for name in chosen if any(part in name for part in _ATTENTION))
    depth = max((layer_of(name) or 0 for name in chosen), default=0)
    upper = frozenset(name for name in chosen if (layer_of(name) or 0) > depth / 2)
    for which, names in (
        ("attention", attention),
        ("the other layers", frozenset(chosen) - attention),
        ("the upper half", upper),
        ("the lower half", frozenset(chosen) - upper),
    ):
        yield f"{which} counts more", _weighted(problem, names)
    if any(decision.rank is not None for decision in plan.tensors):
        yield "no pairs", problem.only(lambda _candidate, option: option.rank is None)


def _neighbours(candidate: Candidates, chosen: TensorDecision) -> Iterator[TensorDecision]:
    """Yield the next smaller and the next larger option, of those that lose less the more bytes they have."""
    order = sorted(range(len(candidate.options)), key=lambda i: (candidate.table.stored[i], candidate.loss[i]))
    front: list[TensorDecision] = []
    least = float("inf")
    for index in order:
        if candidate.loss[index] < least:
            least = float(candidate.loss[index])
            front.append(candidate.options[index])
    place = next((i for i, option in enumerate(front) if option.type == chosen.type), None)
    if place is None:
        return
    if place > 0:
        yield front[place - 1]
    if place + 1 < len(front):
        yield front[place + 1]


def _fixed(problem: Problem, name: str, only: TensorDecision) -> Problem:
    return problem.only(lambda candidate, option: candidate.name != name or option == only)


def _weighted(problem: Problem, names: frozenset[str]) -> Problem:
    """Return the problem with the losses of the ranked layers among ``names`` raised."""
    weighted = (
        replace(candidate, loss=candidate.loss * _DOUBT)
        if candidate.module is not None and candidate.name in names
        else candidate
        for candidate in problem.candidates
    )
    return replace(problem, candidates=tuple(weighted))


def _predicted(problem: Problem, budget: Budget, best: Plan, other: Plan) -> Plan:
    """Return ``other`` as ``problem`` predicts it, with what is known about ``best`` in its certificate."""
    chosen = {decision.name: replace(decision, name="", kept=None) for decision in other.tensors}
    alone = problem.only(lambda candidate, option: option == chosen[candidate.name])
    plan = alone.plan(budget, best.serving, exact=False)
    certificate = replace(best.certificate, bytes_left=plan.certificate.bytes_left)
    return replace(plan, certificate=certificate, notes=(*plan.notes, *gaussian_note(problem, plan)))
