"""``plan.json``: one decision per tensor, and the bytes that they add up to. See docs/plan.md."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import exp, log
from operator import lt
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from acip_export.artifacts.document import Artifact, decode_artifact
from acip_export.artifacts.names import PAPERS, PLAN, ArtifactName
from acip_export.errors import PlanFileError
from acip_export.io.inputs import Count, Finite, NotNegative, Positive, PositiveFloat, read_input
from acip_export.io.outputs import claim_output, json_kind
from acip_export.io.stamps import stamp_of
from acip_export.model.task import LOSS_UNITS, Task
from acip_export.rounding.quantizer import Rounding
from acip_export.weight_types import WeightType, first_release, types_of, weight_type

PLAN_KIND = json_kind(PLAN.noun, PLAN.artifact)

Representation = Literal["dense", "factored", "lora", "residual"]
# What a budget covers: the files; files, caches and buffers; all of the process, the runtime's own parts included; or
# what of that the system cannot drop, because no file backs it.
BudgetScope = Literal["process", "anonymous", "memory", "file"]
# Keys of the breakdown that no plan changes: they count in the scope "process" only.
RUNTIME_PARTS = ("runtime_library", "runtime_tokenizer")

Name = Annotated[str, Meta(min_length=1, max_length=1000)]
# Of components, half-open.
Range = tuple[Count, Positive]
# Tokens; runtimes count them in 32 bits.
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# A plan is far off when its predicted perplexity is more than this many times the dense model's.
FAR_OFF = 1.5
# Longest name of a file in bytes, by every common file system.
LONGEST_FILE_NAME = 255


@dataclass(frozen=True)
class TensorDecision:
    """What becomes of one weight matrix (or one-dimensional parameter).

    Attributes:
        name: Hugging Face tensor name, ending in ``.weight`` or ``.bias``.
        shape: ``(out, in)``, or ``(n,)``.
        representation: ``dense``: one matrix. ``factored``: ``up @ down`` of rank ``rank``. ``adapter``: the
            same as a LoRA over an all-zero base of format ``format`` (GGUF's adapter layout). ``residual``: a base of
            format ``format`` that holds the weight without its LoRA pair, which corrects the base's rounding.
        format: weight format of the dense or base matrix; ``None`` for ``factored``.
        rank: columns of ``up`` (out, rank) and rows of ``down`` (rank, in).
        up_type, down_type: weight formats of the pair.
        kept: ``[start, stop)`` ranges of the singular components kept, in the score file's order of components;
            ``None`` where the pair is not made of them (``residual``).
        nbytes: exact bytes of the stored numbers.
    """

    name: Name
    shape: Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=2)]
    representation: Representation
    nbytes: Count
    type: Name | None = None
    rank: Positive | None = None
    up_type: Name | None = None
    down_type: Name | None = None
    kept: Annotated[tuple[Range, ...], Meta(min_length=1)] | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the types that its numbers are stored in."""
        return tuple(name for name in (self.type, self.up_type, self.down_type) if name is not None)


def types_used(tensors: Iterable[TensorDecision]) -> set[str]:
    """Return the names of all types that these are stored in."""
    return {name for decision in tensors for name in decision.types}


@dataclass(frozen=True)
class Serving:
    """The settings that the memory promise holds for; converters write them into the export where they can.

    Attributes:
        context: tokens of KV cache.
        cache_type_k, cache_type_v: of its keys and its values, each one of the format's; values not said are as keys.
        prompt_batch: tokens of a prompt that are processed together (llama.cpp ``n_ubatch``, genai ``chunk_size``).
        backend: what computes inside the runtime; see :class:`acip_export.formats.protocol.Backend`.
    """

    context: Tokens
    cache_type_k: Name
    prompt_batch: Tokens
    backend: Name = "cpu"
    cache_type_v: Name = ""

    def __post_init__(self) -> None:
        if not self.cache_type_v:
            object.__setattr__(self, "cache_type_v", self.cache_type_k)

    @property
    def cache_types(self) -> str:
        """Both types as people read them: ``q8_0``, or ``q8_0 (K), q4_0 (V)``."""
        return cache_types(self.cache_type_k, self.cache_type_v)


def cache_types(keys: str, values: str) -> str:
    """Return two types of a KV cache as people read them: ``q8_0``, or ``q8_0 (K), q4_0 (V)``."""
    return keys if keys == values else f"{keys} (K), {values} (V)"


@dataclass(frozen=True)
class Alternative:
    """What another setting, or another budget, would give; ``change`` is the flag that asks for it."""

    change: str
    predicted_loss: Finite
    predicted_perplexity: PositiveFloat | None

    @property
    def far_off(self) -> bool:
        """Whether it is as far off the dense model as nobody wants unasked."""
        return self.predicted_perplexity is not None and self.predicted_loss > log(FAR_OFF)


@dataclass(frozen=True)
class Refusal:
    """A type that was allowed, and that ``tensors`` matrices (``example`` is one) cannot take."""

    type: Name
    tensors: Positive
    example: str
    reason: str


@dataclass(frozen=True)
class ContextCost:
    """What a context takes and leaves of quality at the plan's budget; without a loss, no plan fits.

    Attributes:
        kv_cache: its bytes.
    """

    context: Tokens
    kv_cache: Count
    predicted_loss: Finite | None = None
    predicted_perplexity: PositiveFloat | None = None


@dataclass(frozen=True)
class Certificate:
    """What is known about how good the plan is.

    Attributes:
        bytes_left: budget minus what the plan uses, in the budget's scope.
        lower_bound: no plan over the same candidates can have a lower predicted loss (Lagrangian relaxation).
        next_upgrade: the cheapest single change that would improve the plan, or ``None`` at full quality.
        next_upgrade_bytes: what it would cost beyond the present plan.
        quantization_only_loss: predicted loss of the best plan without low rank at the same budget, ``None`` when no
            such plan fits.
        alternatives: other settings that would give a better plan at the same budget, each planned; for a plan that is
            far off, also what would bring it near.
        refused_types: what the format or its backend ruled out.
        contexts: what each doubling of the context costs, where the budget covers the cache.
    """

    bytes_left: Count
    lower_bound: Finite
    next_upgrade: str | None = None
    next_upgrade_bytes: Count | None = None
    quantization_only_loss: Finite | None = None
    alternatives: tuple[Alternative, ...] = ()
    refused_types: tuple[Refusal, ...] = ()
    contexts: tuple[ContextCost, ...] = ()


@dataclass(frozen=True)
class PlannedSpeed:
    """Predicted tokens a second in a runtime: of a prompt as long as the context, and of an answer at its end.

    Attributes:
        prompt: ``None``: nobody timed prompts there.
        prompt_error, answer_error: how far they may be off, as a share; ``None``: not known.
    """

    runtime: Name
    prompt: PositiveFloat | None
    answer: PositiveFloat
    prompt_error: NotNegative | None = None
    answer_error: NotNegative | None = None


@dataclass(frozen=True)
class MeasuredCandidate:
    """A plan for the same budget that was run on held-out text before one was chosen; losses in the plan's unit.

    Attributes:
        change: what sets it apart from the best predicted plan.
        measured_loss: divergence from the dense model, and ``error``, its standard error; ``None``: it did not run, and
            ``failure`` says why.
    """

    change: Name
    predicted_loss: Finite
    measured_loss: NotNegative | None = None
    error: NotNegative | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Plan(Artifact):
    """A complete plan.

    Attributes:
        format: of the export, and ``layout``: one of that format's.
        model_fingerprint: of the checkpoint that was planned for (:attr:`Checkpoint.fingerprint`).
        scores_sha256: of the score file; empty for scores that were never in a file.
        budget_bytes, budget_scope: what was asked.
        planned_bytes: bytes of all files of the export together; equals the sum over ``files``.
        memory_bytes: bytes that the runtime holds for this model; equals the sum over ``breakdown`` without the
            runtime's own parts (:data:`RUNTIME_PARTS`).
        files: exact bytes by file name.
        breakdown: memory by purpose. anonymous: what of each part no file backs, so that the system cannot drop it.
        predicted_loss: above the dense model, in ``loss_unit``.
        predicted_divergence: from the dense model, in ``loss_unit``: another than the loss where components are
            dropped. ``None``: the ranking did not measure it.
        adapters: whether the learned adapters are folded in.
        tensors: one decision per tensor of the checkpoint.
        device: name of the device whose memory was planned for, if it was one.
        options: what the user told the format beyond the model directory (:attr:`Checkpoint.options`).
        rounding: how the codes of its matrices are chosen, in the types that know more than the nearest.
        calibrated: whether the prediction was scaled to losses measured on the model.
        candidates: what was compared with it by measuring, itself included; empty: nothing.
        speed: on the machine that was planned for; ``None``: not known, of this runtime and these types.
        types: those that it chose from, if not the format's own.
        runtime_release: the first of the format's default runtime that is known to read its types; ``None``: all in use
            read them.
        tune_seconds: for how long its scales, vectors and pairs are tuned before it is written; ``None``: not at all.
    """

    NAME: ClassVar[ArtifactName] = PLAN

    format: Name
    layout: Name
    task: Task
    model: Name
    model_fingerprint: Name
    scores_sha256: str
    budget_bytes: Positive
    budget_scope: BudgetScope
    planned_bytes: Count
    memory_bytes: Count
    files: Mapping[str, Count]
    breakdown: Mapping[Name, Count]
    predicted_loss: Finite
    predicted_perplexity: PositiveFloat | None
    size_ratio: NotNegative
    adapters: bool
    serving: Serving
    certificate: Certificate
    tensors: tuple[TensorDecision, ...]
    anonymous: Mapping[Name, Count] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: Name | None = None
    options: Mapping[Name, str] = field(default_factory=dict)
    rounding: Rounding = "nearest"
    calibrated: bool = False
    candidates: tuple[MeasuredCandidate, ...] = ()
    speed: PlannedSpeed | None = None
    tune_seconds: PositiveFloat | None = None
    types: tuple[Name, ...] = ()
    predicted_divergence: Finite | None = None
    runtime_release: Name | None = None

    @property
    def loss_unit(self) -> str:
        """What losses are counted in."""
        return LOSS_UNITS[self.task]

    @property
    def dense_perplexity(self) -> float | None:
        """Of the dense model on the text that the ranking measured, where the task has one."""
        return None if self.predicted_perplexity is None else self.predicted_perplexity * exp(-self.predicted_loss)

    @property
    def far_off(self) -> str | None:
        """Say how far, if the prediction is far off the dense model; ``None`` if it is near."""
        if self.predicted_perplexity is None or self.predicted_loss <= log(FAR_OFF):
            return None
        times = exp(min(self.predicted_loss, 700.0))
        return (
            f"predicted perplexity {self.predicted_perplexity:,.2f} is {times:,.2f} times the dense model's "
            f"{self.dense_perplexity:,.2f}"
        )

    @property
    def process_bytes(self) -> int:
        """Resident memory of a process that serves the export: ``memory_bytes`` and the runtime itself."""
        return sum(self.breakdown.values())

    @property
    def anonymous_bytes(self) -> int:
        """What of ``process_bytes`` the system cannot drop."""
        return sum(self.anonymous.values())

    @property
    def used_bytes(self) -> int:
        """What counts against the budget."""
        return {
            "file": self.planned_bytes,
            "memory": self.memory_bytes,
            "anonymous": self.anonymous_bytes,
            "process": self.process_bytes,
        }[self.budget_scope]

    def counted(self, part: str) -> int:
        """Return what the budget's scope covers of this key of the breakdown, in bytes."""
        if self.budget_scope == "anonymous":
            return self.anonymous.get(part, 0)
        covered = {
            "file": part in ("weights", "tokenizer_and_metadata"),
            "memory": part not in RUNTIME_PARTS,
            "process": True,
        }[self.budget_scope]
        return self.breakdown[part] if covered else 0


def save_plan(plan: Plan, file: Path, force: bool = False) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    with claim_output(file, PLAN_KIND, force).new_file() as temporary:
        temporary.write_text(dumps_plan(plan), encoding="utf-8")


def dumps_plan(plan: Plan) -> str:
    """One line a tensor: readable, and a diff shows what changed."""
    data = plan.to_json()
    tensors = data.pop("tensors")
    for name in ("predicted_divergence", "runtime_release"):
        if data.get(name) is None:
            data.pop(name, None)  # plans from before it keep their hash
    lines = [json.dumps({k: v for k, v in t.items() if v is not None}) for t in tensors]
    head = json.dumps(data, indent=1)
    return head[:-2] + ',\n "tensors": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def plan_sha256(plan: Plan) -> str:
    """Return what tells plans apart."""
    return hashlib.sha256(dumps_plan(plan).encode()).hexdigest()


def numbers_sha256(plan: Plan) -> str:
    """Return what tells apart what plans make of a model: the plan, and the files that its options name."""
    digest = hashlib.sha256(dumps_plan(plan).encode())
    for name, value in sorted(plan.options.items()):
        digest.update(f"{name} {stamp_of(Path(value)) if Path(value).is_file() else None}\n".encode())
    return digest.hexdigest()


def load_plan(file: str | os.PathLike[str]) -> Plan:
    """Read and check a plan.

    Raises:
        PlanFileError: unreadable, unknown version or key, or values that contradict each other.
    """
    file = Path(file)
    missing = f"; make it with  acip-export plan --budget … -o {file}"
    return decode_plan(read_input(file, PlanFileError, missing=missing), str(file))


def decode_plan(data: bytes, where: str) -> Plan:
    """Build a plan from JSON; ``where`` names its origin in messages. Raises as :func:`load_plan`."""
    plan = decode_artifact(data, Plan, where, PlanFileError)
    problem = next(_problems(plan), None)
    if problem is not None:
        raise PlanFileError(f"{where}: {problem}; it is damaged or was edited by hand: plan again")
    return plan


def decision_bytes(decision: TensorDecision, format_name: str) -> int:
    """The bytes of a decision by the table in :mod:`acip_export.weight_types`.

    Raises:
        ValueError: the decision contradicts itself, its format has no such type, or a row does not fit it.
    """
    rows, columns = decision.shape if len(decision.shape) == 2 else (1, decision.shape[0])
    total = 0
    if decision.representation != "factored":
        if decision.type is None:
            raise ValueError(f"{decision.representation} without a type")
        total += _type(format_name, decision.type).nbytes(rows, columns)
    if decision.representation != "dense":
        if not decision.rank or decision.up_type is None or decision.down_type is None:
            raise ValueError(f"{decision.representation} without rank and types")
        total += _type(format_name, decision.up_type).nbytes(rows, decision.rank)
        total += _type(format_name, decision.down_type).nbytes(decision.rank, columns)
    return total


def _type(format_name: str, name: str) -> WeightType:
    try:
        return weight_type(format_name, name)
    except KeyError:
        raise ValueError(f"{format_name} has no type {name!r}") from None


def _problems(plan: Plan) -> Iterator[str]:
    """What is wrong although every value has its type; each begins with the place."""
    for index, decision in enumerate(plan.tensors):
        for problem in _decision_problems(decision, plan.format):
            yield f"$.tensors[{index}] ({decision.name}): {problem}"
    used = types_used(plan.tensors)
    release = first_release(type_ for type_ in types_of(plan.format) if type_.name in used)
    if plan.runtime_release != release:
        yield f"$.runtime_release: {plan.runtime_release}, and its types need {release}"
    for name in plan.types:
        try:
            _type(plan.format, name)
        except ValueError as reason:
            yield f"$.types: {reason}"
    names = [decision.name for decision in plan.tensors]
    if len(set(names)) < len(names):
        yield f"$.tensors: {next(name for name in names if names.count(name) > 1)} is decided about twice"
    for name in plan.files:
        if not _is_file_name(name):
            yield f"$.files: {name!r} is no name of a file below the export's directory"
    memory = {name: size for name, size in plan.breakdown.items() if name not in RUNTIME_PARTS}
    for key, total, parts, what in (
        ("planned_bytes", plan.planned_bytes, plan.files, "files"),
        ("memory_bytes", plan.memory_bytes, memory, "breakdown"),
    ):
        if total != sum(parts.values()):
            yield f"$.{key}: the {what} add up to {sum(parts.values()):,} bytes, not {total:,}"
    for part, nbytes in plan.anonymous.items():
        if nbytes > plan.breakdown.get(part, 0):
            yield f"$.anonymous.{part}: {nbytes:,} bytes of {plan.breakdown.get(part, 0):,} in the breakdown"
    if plan.budget_scope == "anonymous" and set(plan.anonymous) != set(plan.breakdown):
        yield "$.anonymous: it must say of every part of the breakdown what counts in the budget"
    if plan.used_bytes > plan.budget_bytes:
        yield f"$.budget_bytes: it uses {plan.used_bytes:,} bytes of a budget of {plan.budget_bytes:,}"


def _decision_problems(decision: TensorDecision, format_name: str) -> Iterator[str]:
    rank, kept = decision.rank, decision.kept
    low_rank = decision.representation != "dense"
    if low_rank and len(decision.shape) != 2:
        yield f"{decision.representation}, but it has no two dimensions"
        return
    if not low_rank and (rank, kept, decision.up_type, decision.down_type) != (None, None, None, None):
        yield "dense, and yet of a rank"
    if decision.representation == "factored" and decision.type is not None:
        yield f"factored, and yet of the type {decision.type}"
    components = min(decision.shape)
    if rank is not None and rank > components:
        yield f"its rank is {rank}, of {components} components"
        return
    if kept is not None and decision.representation in ("factored", "lora"):
        bounds = list(chain.from_iterable(kept))
        count = sum(bounds[1::2]) - sum(bounds[::2])
        if not all(map(lt, bounds, bounds[1:])) or bounds[-1] > components:
            yield f"kept must be growing ranges below {components}, none empty"
        elif count != rank:
            yield f"kept are {count} components, its rank is {rank}"
    elif kept is not None:
        yield f"{decision.representation}, and yet made of kept components"
    try:
        expected = decision_bytes(decision, format_name)
    except ValueError as reason:
        yield str(reason)
    else:
        if decision.nbytes != expected:
            yield f"nbytes is {decision.nbytes:,}, its decision takes {expected:,}"


def _is_file_name(name: str) -> bool:
    """Whether it names a file that an export may have: below its directory, and none of its papers."""
    path = PurePosixPath(name)
    return (
        name == str(path)
        and name.isprintable()
        and "\\" not in name
        and not path.is_absolute()
        and ".." not in path.parts
        and name not in ("", ".", *PAPERS)
        and all(len(part.encode()) <= LONGEST_FILE_NAME for part in path.parts)
    )
