"""The planner: a pure function of checkpoint shapes, score file and request to the best plan within the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp

import numpy as np

from acip_export.artifacts.plan import BudgetScope, Certificate, Plan, Serving, TensorDecision
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import UsageError
from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat, Layout
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import encoder_of
from acip_export.planning.candidates import Candidates, build_candidates
from acip_export.planning.capacity_search import Solution, Table, solve
from acip_export.planning.certificate import explain, infeasible
from acip_export.planning.knapsack import Allocation, Knapsack, pareto
from acip_export.planning.losses import Calibration, FloatArray, calibrate, component_losses
from acip_export.planning.memory import (
    PROMPT_BATCHES,
    choose_prompt_batch,
    held_bytes,
    memory_breakdown,
)
from acip_export.planning.tensor_limit import fitting
from acip_export.weight_types import weight_type

PredictFiles = Callable[[tuple[TensorDecision, ...], Serving], Mapping[str, int]]
# Flags and floors of the other formats, for a request that does not fit.
OtherFloors = Callable[[], Sequence[tuple[str, int]]]

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for.

    Attributes:
        budget_bytes, budget_scope: all of the process, what it holds for this model, or the files.
        types: names of the formats to choose from; empty: the target's defaults.
        context: tokens; ``None``: the model's, at most ``default_context``.
        cache_type: ``None``: the target's default. prompt_batch: ``None``: chosen to suit the budget.
        runtime: of the target; ``None``: its default.
        backend: what runs the export (``cpu``, ``webgpu``, ...); ``None``: the target's default.
        layout: a layout of the target; ``None``: the runtime's default. Planning for several (``auto``) is the
            caller's, who has each one's prediction of files.
        device: name of the device that the budget is of, if it is of one.
        whole_prompts: prompts are computed in one piece, whatever their length; then the prompt batch is the context.
        largest_file: bytes of the largest file that can be loaded; ``None``: any. Checking it is the caller's.
        options: for the target's converter; :attr:`acip_export.formats.protocol.ExportFormat.options` names them.
    """

    format: str
    budget_bytes: int
    budget_scope: BudgetScope = "memory"
    runtime: str | None = None
    backend: str | None = None
    layout: str | None = None
    types: tuple[str, ...] = ()
    context: int | None = None
    cache_type: str | None = None
    prompt_batch: int | None = None
    default_context: int = DEFAULT_CONTEXT
    device: str | None = None
    whole_prompts: bool = False
    largest_file: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    request: PlanRequest,
    predict_files: PredictFiles,
    errors: RoundingErrors | None = None,
    other_floors: OtherFloors = lambda: (),
) -> Plan:
    """The plan of least predicted loss whose exact bytes are within the budget.

    ``predict_files(decisions, runtime)`` is the target converter's exact prediction. ``errors``: what rounding costs,
    measured on this model (:func:`acip_export.api.rounding_errors`); ``None``: as on Gaussian weights.
    ``other_floors()``: what the refusal of a budget says about other formats.

    Raises:
        InfeasibleBudgetError: no plan fits; names the smallest budget that does, what dominates it, and what would fit.
        ScoreFileError: the score file is of another model.
        UsageError, UnsupportedError: the request contradicts itself, the model or the target.
    """
    problem = replace(Problem.of(checkpoint, scores, request, predict_files, errors), other_floors=other_floors)
    plan = problem.plan(request)
    notes = (*plan.notes, *_gaussian_note(plan, scores, errors))
    return replace(plan, certificate=explain(problem, request, plan), notes=notes)


@dataclass(frozen=True)
class Problem:
    """What all budgets, contexts and cache types of one model, target, layout and set of types share.

    Attributes:
        candidates: one entry per tensor. calibration: from their summed losses to the measured loss.
        dropping: loss of dropping each component, by module.
    """

    checkpoint: Checkpoint
    scores: ScoreFile
    format: ExportFormat
    layout: Layout
    candidates: tuple[Candidates, ...]
    calibration: Calibration
    dropping: Mapping[str, FloatArray]
    predict_files: PredictFiles
    other_floors: OtherFloors = lambda: ()
    _tables: dict[BudgetScope, Table] = field(default_factory=dict, repr=False, compare=False)
    _smallest: dict[tuple[BudgetScope, Serving], Solution] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        scores: ScoreFile,
        request: PlanRequest,
        predict_files: PredictFiles,
        errors: RoundingErrors | None = None,
    ) -> Problem:
        """Raises as :func:`make_plan`, but for the budget."""
        scores.check_model(checkpoint)
        target = export_format(request.format, request.backend)
        layout, *others = target.layouts_for(request.layout, request.runtime)
        if others:
            raise UsageError(f"one plan is for one layout: {', '.join(each.name for each in (layout, *others))}")
        losses = component_losses(scores)
        types = target.choose_types(request.types)
        errors = errors or RoundingErrors(target.name, "", scores.sha256)
        built = build_candidates(checkpoint, scores, losses, target, layout, types, errors)
        candidates = fitting(built, target, request.options)
        return cls(checkpoint, scores, target, layout, candidates, calibrate(scores, losses), losses, predict_files)

    def _adapters(self, decisions: tuple[TensorDecision, ...]) -> bool:
        """Whether the learned adapters help: they make up for dropped components, and rounding is none of their
        business."""
        dropped = 0.0
        for decision in decisions:
            if decision.kept is not None:
                losses = self.dropping[decision.module]
                dropped += float(losses.sum() - sum(losses[start:stop].sum() for start, stop in decision.kept))
        return dropped > 0 and self.calibration.adapters(dropped)

    def only(self, allowed: Callable[[Candidates, TensorDecision], bool]) -> Problem:
        """With fewer candidates: presets, or quantization alone."""
        candidates = tuple(candidate.only(allowed) for candidate in self.candidates)
        return replace(self, candidates=candidates, _tables={}, _smallest={})

    def plan(self, request: PlanRequest, exact: bool = True) -> Plan:
        """The best plan; without ``exact``, one within a candidate of it. The certificate has no explanations yet.

        Raises as :func:`make_plan`.
        """
        runtime, fixed = self.settings(request)
        room = request.budget_bytes - fixed
        smallest = self._floor(request, runtime)
        if smallest.used > room:
            raise infeasible(self, request)
        table, running = self._table(request), self._running(runtime)
        solution = solve(table, smallest, room, running, lambda a: self._exactly(a, request, runtime), exact)
        target, checkpoint, scores, calibration = self.format, self.checkpoint, self.scores, self.calibration
        memory = target.memory.serving(checkpoint.shape, runtime)
        loss = calibration.loss(solution.allocation.loss)
        certificate = self._certificate(solution, request, room, exact)
        low_rank = self.layout.low_rank is not None
        return Plan(
            format=target.name,
            layout=self.layout.name,
            task=scores.task,
            model=checkpoint.name,
            model_fingerprint=checkpoint.fingerprint,
            scores_sha256=scores.sha256,
            budget_bytes=request.budget_bytes,
            budget_scope=request.budget_scope,
            planned_bytes=solution.file_bytes,
            memory_bytes=solution.file_bytes + solution.repacked + memory.total,
            files=solution.files,
            breakdown=memory_breakdown(target, checkpoint, solution.decisions, solution.file_bytes, runtime),
            predicted_loss=loss,
            predicted_perplexity=exp(min(calibration.dense_loss + loss, 700.0)) if scores.task == "causal" else None,
            size_ratio=solution.file_bytes / checkpoint.weight_bytes,
            adapters=self._adapters(solution.decisions),
            serving=runtime,
            options=dict(request.options),
            certificate=certificate,
            tensors=solution.decisions,
            notes=_notes(solution, certificate, loss, low_rank, scores.loss_unit)
            + ((self.layout.note,) if self.layout.note else ())
            + target.file_notes(solution.files, request.options),
            device=request.device,
        )

    def settings(self, request: PlanRequest) -> tuple[Serving, int]:
        """The runtime's settings, and the bytes of the budget that no choice of tensors changes."""
        base = self.format.memory.process(self.checkpoint).total
        runtime = _runtime(self.checkpoint, self.format, request, base if request.budget_scope == "process" else 0)
        memory = self.format.memory.serving(self.checkpoint.shape, runtime).total
        return runtime, {"file": 0, "memory": memory, "process": memory + base}[request.budget_scope]

    def floor(self, request: PlanRequest) -> tuple[int, dict[str, int]]:
        """The smallest budget with a plan, and what it consists of."""
        runtime, fixed = self.settings(request)
        smallest = self._floor(request, runtime)
        parts = {"weights": smallest.stored, "tokenizer and metadata": smallest.file_bytes - smallest.stored}
        if request.budget_scope != "file":
            memory = self.format.memory.serving(self.checkpoint.shape, runtime)
            parts |= {
                "repacked weights": smallest.repacked,
                "KV cache": memory.kv_cache,
                "compute and output buffers": memory.compute + memory.output,
            }
        if request.budget_scope == "process":
            parts["runtime and its tokenizer"] = self.format.memory.process(self.checkpoint).total
        return smallest.used + fixed, parts

    def _table(self, request: PlanRequest) -> Table:
        """The candidates as the budget's scope counts them; asked for often, so kept."""
        scope = _counted(request)
        if scope not in self._tables:
            around_pair = self._around_pair(request)
            table = Table.of(self.candidates, self.format, scope, around_pair)
            if scope != "file":  # the tokenizer is built whatever is chosen
                building = self.format.memory.process(self.checkpoint).building
                table = replace(table, loading=np.maximum(table.loading, building))
            self._tables[scope] = table
        return self._tables[scope]

    def _around_pair(self, request: PlanRequest) -> int:
        """Bytes of files that a low-rank layer has around its numbers beyond those of a dense one: their mean."""
        dense, pairs, differ = [], [], 0
        for candidate in self.candidates:
            order = np.argsort(candidate.table.nbytes, kind="stable")
            low_rank = candidate.table.low_rank[order]
            both = low_rank.any() and not low_rank.all()
            differ += int(both)
            dense.append(candidate.decision(int(order[np.argmin(low_rank)])))
            pairs.append(candidate.decision(int(order[np.argmax(low_rank)])))
        if not differ:
            return 0  # such as a layout without pairs
        # At one context for all requests: the answer to one must not depend on which came first.
        runtime = Serving(1, next(iter(self.format.cache_types)), 1, request.backend or DEFAULT_BACKEND)
        around = [
            sum(self.predict_files(tuple(tensors), runtime).values()) - sum(tensor.nbytes for tensor in tensors)
            for tensors in (dense, pairs)
        ]
        return max(0, (around[1] - around[0]) // differ)

    def _floor(self, request: PlanRequest, serving: Serving) -> Solution:
        """The smallest plan."""
        key = (_counted(request), serving)
        if key not in self._smallest:
            self._smallest[key] = self._exactly(self._table(request).smallest(), request, serving)
        return self._smallest[key]

    def _running(self, serving: Serving) -> int:
        """What comes after loading, in the bytes that loading leaves free."""
        tokenizer = self.format.memory.process(self.checkpoint).tokenizer
        return self.format.memory.serving(self.checkpoint.shape, serving).total + tokenizer

    def _exactly(self, allocation: Allocation, request: PlanRequest, serving: Serving) -> Solution:
        decisions = tuple(c.decision(i) for c, i in zip(self.candidates, allocation.chosen, strict=True))
        files = dict(self.predict_files(decisions, serving))
        repacked = held_bytes(self.format, self.checkpoint, decisions, serving).total
        used = sum(files.values()) + (repacked if request.budget_scope != "file" else 0)
        return Solution(allocation, decisions, files, repacked, used)

    def _certificate(self, solution: Solution, request: PlanRequest, room: int, exact: bool) -> Certificate:
        allocation = solution.allocation
        left = room - solution.used
        bound = self.calibration.loss(max(0.0, allocation.lower_bound))
        if not exact:
            return Certificate(left, bound)
        table = self._table(request)
        best: tuple[float, int, str] | None = None
        for candidate, choices, chosen in zip(self.candidates, table.groups, allocation.chosen, strict=True):
            for other in pareto(choices):
                gain = float(choices.loss[chosen] - choices.loss[other])
                extra = int(choices.nbytes[other] - choices.nbytes[chosen])
                if gain > 0 and extra > left and (best is None or gain / extra > best[0]):
                    best = (gain / extra, extra, describe(candidate.decision(int(other))))
        dense_loss: float | None = self.calibration.loss(allocation.loss)
        if self.layout.low_rank is not None:
            dense = [~candidate.table.low_rank for candidate in self.candidates]
            alone = None
            if all(mask.any() for mask in dense):
                alone = Knapsack(table.groups, dense).solve(room - solution.overhead, exact=False)
            dense_loss = None if alone is None else self.calibration.loss(alone.loss)
        return Certificate(
            bytes_left=left,
            lower_bound=bound,
            next_upgrade=None if best is None else best[2],
            next_upgrade_bytes=None if best is None else best[1],
            quantization_only_loss=dense_loss,
        )


def _counted(request: PlanRequest) -> BudgetScope:
    """The scope by which candidates differ: what a process holds beside ``memory`` is the same for all of them."""
    return "file" if request.budget_scope == "file" else "memory"


def choose_context(checkpoint: Checkpoint, request: PlanRequest) -> int:
    """Tokens of context: the requested ones, or the default, as far as model and target go.

    Raises:
        UsageError: more than the model was made for, or none.
    """
    encoder = encoder_of(checkpoint)
    longest = export_format(request.format).longest_context(checkpoint.shape) if encoder is None else encoder.max_length
    context = min(longest, request.default_context) if request.context is None else request.context
    if not 0 < context <= longest:
        why = (
            ""
            if encoder is not None or longest == checkpoint.shape.max_context
            else f"; {request.format} has no sliding window for it"
        )
        raise UsageError(f"--context {context} is outside what the model was made for: 1 to {longest} tokens{why}")
    return context


def _runtime(checkpoint: Checkpoint, target: ExportFormat, request: PlanRequest, taken: int) -> Serving:
    """``taken``: bytes of the budget that no choice changes."""
    encoder = encoder_of(checkpoint)
    context = choose_context(checkpoint, request)
    cache_type = request.cache_type or next(iter(target.cache_types))
    backend = request.backend or DEFAULT_BACKEND
    if cache_type not in target.cache_types:
        raise UsageError(f"{target.name} has no KV cache type {cache_type!r}; it has: {', '.join(target.cache_types)}")
    batch = context if request.whole_prompts and request.prompt_batch is None else request.prompt_batch
    if batch is None:
        room = request.budget_bytes - taken
        longest_batch = Serving(context, cache_type, context, backend)
        batch = choose_prompt_batch(target, checkpoint.shape, longest_batch, room)
        if request.budget_scope == "file" and encoder is None:
            batch = min(PROMPT_BATCHES[0], context)
    if encoder is not None and batch < context:
        raise UsageError(
            f"--prompt-batch {batch} is less than a text of --context {context} tokens, which an encoder reads in one "
            "piece; give more, or a shorter --context"
        )
    return Serving(context, cache_type, batch, backend)


def describe(decision: TensorDecision) -> str:
    """``layers.0.mlp.up_proj: rank 128, q8_0``"""
    if decision.rank is None:
        return f"{decision.module}: dense {decision.type}"
    return f"{decision.module}: rank {decision.rank}, {decision.down_type} x {decision.up_type}"


def _notes(solution: Solution, certificate: Certificate, loss: float, low_rank: bool, unit: str) -> tuple[str, ...]:
    if not low_rank:
        return ("this layout stores dense tensors only: the budget is spent on types",)
    factored = sum(decision.rank is not None for decision in solution.decisions)
    if factored == 0:
        return ("low rank does not pay at this budget: quantization alone is predicted to be better",)
    alone = certificate.quantization_only_loss
    if alone is None:
        return (f"{factored} layers are low rank; quantization alone does not fit this budget",)
    return (f"{factored} layers are low rank: predicted loss {loss:.4f} instead of {alone:.4f} {unit}",)


def _gaussian_note(plan: Plan, scores: ScoreFile, errors: RoundingErrors | None) -> tuple[str, ...]:
    """Say so when the plan's rounding errors are those of Gaussian weights, where the model's own can be measured."""
    rounded = [
        decision
        for decision in plan.tensors
        if (decision.module in scores.modules or decision.name in scores.embedding_sensitivity)
        and any(
            name and not weight_type(plan.format, name).is_float
            for name in (decision.type, decision.down_type, decision.up_type)
        )
    ]
    gaussian = sum(errors is None or not errors.measured(decision) for decision in rounded)
    if not gaussian:
        return ()
    return (
        f"rounding errors of {gaussian} of {len(rounded)} quantized matrices are those of Gaussian weights; with the "
        f"quantizer of {plan.format} installed they are measured on this model",
    )
