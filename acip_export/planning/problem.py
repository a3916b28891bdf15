"""A planning problem: one model and one search space. It answers any budget and serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp

import numpy as np

from acip_export.artifacts.cache_losses import CacheLosses
from acip_export.artifacts.plan import BudgetScope, Certificate, Plan, Serving, TensorDecision, types_used
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.budget import Budget
from acip_export.planning.candidates import Candidates, Counted, build_candidates
from acip_export.planning.capacity_search import Search, Solution, Table
from acip_export.planning.certificate import loss_of_quantization_alone, low_rank_note, next_upgrade
from acip_export.planning.export_sizes import ExportSizes
from acip_export.planning.losses import FloatArray, MeasuredCuts, component_divergences, component_losses, measured_cuts
from acip_export.planning.memory import HeldBytes, ModelMemory
from acip_export.planning.space import SearchSpace
from acip_export.planning.tensor_limit import fitting
from acip_export.units import format_bytes
from acip_export.weight_types import WeightType, first_release

# Which bytes of its candidates a scope counts: the process's own parts no candidate changes.
_COUNTED: dict[BudgetScope, Counted] = {
    "file": "files",
    "memory": "memory",
    "process": "memory",
    "anonymous": "anonymous",
}


@dataclass(frozen=True)
class Floor:
    """The smallest budget that has a plan, and what it consists of, in bytes by purpose."""

    nbytes: int
    parts: Mapping[str, int]


class DoesNotFit(Exception):  # noqa: N818 - an answer, which the caller explains
    """No plan is within the budget; ``floor`` is the smallest budget that has one."""

    def __init__(self, floor: Floor) -> None:
        super().__init__(f"the smallest budget with a plan is {floor.nbytes:,} bytes")
        self.floor = floor


@dataclass(frozen=True)
class Problem:
    """What all budgets and serving settings of one model and search space share.

    Attributes:
        errors: what rounding costs, where it was measured on this model.
        candidates: one entry per tensor.
        cuts: what the ranking measured.
        dropping: the loss of dropping each component, by module.
        sizes: what decisions take, to the byte.
        cache_losses: what cache types cost; of one that was not measured, nothing is predicted.
    """

    checkpoint: Checkpoint
    scores: ScoreFile
    space: SearchSpace
    errors: RoundingErrors
    candidates: tuple[Candidates, ...]
    cuts: MeasuredCuts
    dropping: Mapping[str, FloatArray]
    sizes: ExportSizes
    cache_losses: CacheLosses

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        scores: ScoreFile,
        space: SearchSpace,
        errors: RoundingErrors | None = None,
        cache_losses: CacheLosses | None = None,
    ) -> Problem:
        """Make every candidate of a search space.

        Args:
            errors: what rounding costs, measured on this model; ``None``: as on Gaussian weights.
            cache_losses: what cache types cost, as far as it was measured.

        Raises:
            ScoreFileError: the score file is of another model.
            UsageError, UnsupportedError: a tensor has no candidate.
        """
        scores.check_model(checkpoint)
        losses = component_losses(scores)
        errors = errors or RoundingErrors(space.format.name, "", scores.sha256)
        candidates = fitting(build_candidates(checkpoint, scores, losses, space, errors), space)
        sizes = ExportSizes(ModelMemory.of(space.format, checkpoint), space.layout.name)
        cuts = measured_cuts(scores, losses)
        cache_losses = cache_losses or CacheLosses(space.format.name, "", scores.sha256)
        return cls(checkpoint, scores, space, errors, candidates, cuts, losses, sizes, cache_losses)

    @property
    def memory(self) -> ModelMemory:
        """What serving takes beside the weights."""
        return self.sizes.memory

    def only(self, allowed: Callable[[Candidates, TensorDecision], bool]) -> Problem:
        """Return the problem with the candidates that ``allowed`` lets through, such as a preset's."""
        return replace(self, candidates=tuple(candidate.only(allowed) for candidate in self.candidates))

    def with_types(self, types: tuple[WeightType, ...]) -> Problem:
        """Return the problem with other weight types, whose rounding counts as on Gaussian weights.

        Raises:
            UsageError, UnsupportedError: a tensor has no candidate.
        """
        space = replace(self.space, types=types)
        return Problem.of(self.checkpoint, self.scores, space, cache_losses=self.cache_losses)

    def plan(self, budget: Budget, serving: Serving, *, exact: bool = True) -> Plan:
        """Return the plan of least predicted loss whose exact bytes are within the budget.

        Without ``exact``, one within a candidate of it. The certificate has no explanations yet.

        Raises:
            DoesNotFit: there is none.
            UnsupportedError: the converter cannot express a decision.
        """
        search = self._searches.search(budget.scope, serving)
        room = budget.nbytes - self.memory.fixed(budget.scope, serving)
        solution = search.best(room, exact=exact)
        if solution is None:
            raise DoesNotFit(self.floor(budget.scope, serving))
        certificate = self._certificate(solution, room - solution.used, serving)
        if exact:
            certificate = self._compared(certificate, search.table, solution, serving)
        return self._plan(solution, budget, serving, certificate, compared=exact)

    def largest(self, scope: BudgetScope, serving: Serving) -> Plan:
        """Return the plan that no larger budget improves; its budget is what it uses."""
        solution = self._searches.search(scope, serving).largest()
        budget = Budget(solution.used + self.memory.fixed(scope, serving), scope)
        return self._plan(solution, budget, serving, self._certificate(solution, 0, serving), compared=False)

    def floor(self, scope: BudgetScope, serving: Serving) -> Floor:
        """Return the smallest budget that has a plan."""
        smallest = self._searches.search(scope, serving).smallest
        nbytes = smallest.used + self.memory.fixed(scope, serving)
        if scope == "anonymous":
            anonymous = self.memory.anonymous(smallest.decisions, serving)
            return Floor(nbytes, {name.replace("_", " "): size for name, size in anonymous.items()})
        parts = {"weights": smallest.stored, "tokenizer and metadata": smallest.file_bytes - smallest.stored}
        if scope != "file":
            memory = self.memory.serving(serving)
            parts |= {
                "repacked weights": smallest.repacked,
                "KV cache": memory.kv_cache,
                "compute and output buffers": memory.compute + memory.output,
            }
        if scope == "process":
            parts["runtime and its tokenizer"] = self.memory.base.total
        return Floor(nbytes, parts)

    @cached_property
    def _searches(self) -> _Searches:
        return _Searches(self.candidates, self.space, self.sizes)

    def _loss(self, of_weights: float, serving: Serving) -> float:
        """Return what weights and cache lose together."""
        return of_weights + (self.cache_losses.loss(serving) or 0.0)

    def _certificate(self, solution: Solution, left: int, serving: Serving) -> Certificate:
        return Certificate(left, self._loss(max(0.0, solution.allocation.lower_bound), serving))

    def _compared(self, certificate: Certificate, table: Table, solution: Solution, serving: Serving) -> Certificate:
        """Add the next upgrade, and what quantization alone would reach."""
        upgrade = next_upgrade(table, solution, certificate.bytes_left)
        alone: float | None = solution.allocation.loss
        if self.space.layout.low_rank is not None:
            alone = loss_of_quantization_alone(table, solution, certificate.bytes_left)
        return replace(
            certificate,
            next_upgrade=None if upgrade is None else upgrade.decision,
            next_upgrade_bytes=None if upgrade is None else upgrade.nbytes,
            quantization_only_loss=None if alone is None else self._loss(alone, serving),
        )

    def _plan(
        self, solution: Solution, budget: Budget, serving: Serving, certificate: Certificate, *, compared: bool
    ) -> Plan:
        space, checkpoint, scores = self.space, self.checkpoint, self.scores
        loss = self._loss(solution.allocation.loss, serving)
        used = types_used(solution.decisions)
        note = dropped = None
        if budget.scope == "anonymous":
            dropped = _droppable_note(solution, self.memory.held_anonymous(solution.decisions, serving))
        if space.layout.low_rank is not None:
            note = low_rank_note(solution, certificate, loss, scores.loss_unit, compared=compared)
        return Plan(
            format=space.format.name,
            layout=space.layout.name,
            model=checkpoint.name,
            model_fingerprint=checkpoint.fingerprint,
            scores_sha256=scores.sha256,
            budget_bytes=budget.nbytes,
            budget_scope=budget.scope,
            planned_bytes=solution.file_bytes,
            memory_bytes=solution.file_bytes + solution.repacked + self.memory.serving(serving).total,
            files=solution.files,
            breakdown=self.memory.breakdown(solution.decisions, solution.file_bytes, serving),
            anonymous=self.memory.anonymous(solution.decisions, serving),
            predicted_loss=loss,
            predicted_divergence=self._divergence(loss, solution.decisions),
            runtime_release=first_release(map(space.format.type, used)),
            predicted_perplexity=exp(min(self.cuts.dense_loss + loss, 700.0)) if scores.task == "causal" else None,
            size_ratio=solution.file_bytes / checkpoint.weight_bytes,
            adapters=self._adapters(solution.decisions),
            serving=serving,
            options=dict(space.options),
            rounding=space.rounding,
            types=() if space.types == space.default_types else tuple(type_.name for type_ in space.types),
            certificate=certificate,
            tensors=solution.decisions,
            notes=(
                *filter(None, [dropped, note, space.layout.note]),
                *space.format.type_notes(used, space.options),
                *space.format.file_notes(solution.files, space.options),
            ),
            task=scores.task,
        )

    def _adapters(self, decisions: tuple[TensorDecision, ...]) -> bool:
        """Return whether the learned adapters help: they make up for dropped components, not for rounding."""
        dropped = _of_dropped(self.dropping, decisions)
        return dropped > 0 and self.cuts.adapters(dropped)

    def _divergence(self, loss: float, decisions: tuple[TensorDecision, ...]) -> float | None:
        """Return how far from the dense model a plan of that loss is; ``None``: not known where components drop.

        They differ in what is dropped alone: to second order, rounding costs as much of the one as of the other.
        """
        if all(decision.kept is None for decision in decisions):
            return loss
        if self._diverging is None:
            return loss if self.scores.task != "causal" else None
        return loss + _of_dropped(self._diverging, decisions) - _of_dropped(self.dropping, decisions)

    @cached_property
    def _diverging(self) -> dict[str, FloatArray] | None:
        return component_divergences(self.scores)


def _of_dropped(costs: Mapping[str, FloatArray], decisions: tuple[TensorDecision, ...]) -> float:
    """Sum the costs of the components that decisions drop, by module."""
    total = 0.0
    for decision in decisions:
        if decision.kept is not None:
            each = costs[decision.module]
            total += float(each.sum() - sum(each[start:stop].sum() for start, stop in decision.kept))
    return total


def _droppable_note(solution: Solution, held: HeldBytes) -> str | None:
    """Say what a budget of anonymous memory leaves out."""
    mapped = solution.file_bytes - held.kept
    if mapped <= 0:
        return None
    return (
        f"{format_bytes(mapped)} of the files stay mapped and are not in the budget: where memory is short, the system "
        "drops them and reads them again for every token"
    )


@dataclass(frozen=True, eq=False)
class _Searches:
    """The searches of one set of candidates, each made when it is first asked for."""

    candidates: tuple[Candidates, ...]
    space: SearchSpace
    sizes: ExportSizes
    _tables: dict[Counted, Table] = field(default_factory=dict, init=False)
    _made: dict[tuple[Counted, Serving], Search] = field(default_factory=dict, init=False)

    def search(self, scope: BudgetScope, serving: Serving) -> Search:
        """Return the search for one serving; what a process holds beside ``memory`` no candidate changes."""
        if serving.backend != self.space.backend:
            raise ValueError(f"the candidates are for {self.space.backend}, not {serving.backend}")
        key = (_COUNTED[scope], serving)
        if key not in self._made:
            self._made[key] = Search(self._table(_COUNTED[scope]), self.sizes, serving)
        return self._made[key]

    def _table(self, counted: Counted) -> Table:
        if counted not in self._tables:
            building = self.sizes.memory.base.building
            self._tables[counted] = Table.of(
                self.candidates,
                self.space.format,
                counted=counted,
                around_pair=self._around_pair,
                building=building,
            )
        return self._tables[counted]

    @cached_property
    def _around_pair(self) -> int:
        """Bytes of files that a low-rank layer has around its numbers beyond those of a dense one: their mean."""
        dense, pairs, differ = [], [], 0
        for candidate in self.candidates:
            order = np.argsort(candidate.table.stored, kind="stable")
            low_rank = candidate.table.low_rank[order]
            differ += int(low_rank.any() and not low_rank.all())
            dense.append(candidate.decision(int(order[np.argmin(low_rank)])))
            pairs.append(candidate.decision(int(order[np.argmax(low_rank)])))
        if not differ:
            return 0  # such as a layout without pairs
        # At one context for all questions: the answer to one must not depend on which came first.
        serving = Serving(1, next(iter(self.space.format.cache_types)), 1, self.space.backend)
        around_pairs, around_dense = (self.sizes.around(tuple(tensors), serving) for tensors in (pairs, dense))
        return max(0, (around_pairs - around_dense) // differ)
