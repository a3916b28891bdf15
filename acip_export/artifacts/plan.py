"""``plan.json``: one decision per tensor, and the bytes that they add up to. See docs/plan.md."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from acip_export.errors import PlanFileError
from acip_export.io.outputs import claim_output, json_kind
from acip_export.weight_types import weight_type

PLAN_VERSION = 2
PLAN_KIND = json_kind("a plan", "acip-plan")
_CAUSAL_UNIT = "nats per token"

Representation = Literal["dense", "factored", "lora", "residual"]
# What a budget covers: the files; files, caches and buffers; or all of the process, the runtime's own parts included.
BudgetScope = Literal["process", "memory", "file"]
# Keys of the breakdown that no plan changes: they count in the scope "process" only.
RUNTIME_PARTS = ("runtime_library", "runtime_tokenizer")
_REPRESENTATIONS = get_args(Representation)


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

    name: str
    shape: tuple[int, ...]
    representation: Representation
    nbytes: int
    type: str | None = None
    rank: int | None = None
    up_type: str | None = None
    down_type: str | None = None
    kept: tuple[tuple[int, int], ...] | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Serving:
    """The settings that the memory promise holds for; converters write them into the export where they can.

    Attributes:
        context: tokens of KV cache.
        cache_type: ``f32``, ``f16`` or ``q8_0``.
        prompt_batch: tokens of a prompt that are processed together (llama.cpp ``n_ubatch``, genai ``chunk_size``).
        backend: what computes inside the runtime; see :class:`acip_export.formats.protocol.Backend`.
    """

    context: int
    cache_type: str
    prompt_batch: int
    backend: str = "cpu"


@dataclass(frozen=True)
class Alternative:
    """What the same budget would give with another setting; ``change`` is the flag that asks for it."""

    change: str
    predicted_loss: float
    predicted_perplexity: float | None


@dataclass(frozen=True)
class Refusal:
    """A type that was allowed, and that ``tensors`` matrices (``example`` is one) cannot take."""

    type: str
    tensors: int
    example: str
    reason: str


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
        alternatives: other settings that would give a better plan at the same budget, each planned.
        refused_types: what constraints of the target ruled out.
    """

    bytes_left: int
    lower_bound: float
    next_upgrade: str | None = None
    next_upgrade_bytes: int | None = None
    quantization_only_loss: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    refused_types: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A complete plan.

    Attributes:
        target: ``gguf`` or ``onnx``; ``layout``: a layout of that target.
        model_fingerprint: of the checkpoint that was planned for (:attr:`Checkpoint.fingerprint`).
        scores_sha256: of the score file.
        budget_bytes, budget_scope: what was asked.
        planned_bytes: bytes of all files of the export together; equals the sum over ``files``.
        memory_bytes: bytes that the runtime holds for this model; equals the sum over ``breakdown`` without the
            runtime's own parts (:data:`RUNTIME_PARTS`).
        files: exact bytes by file name.
        breakdown: memory by purpose.
        predicted_loss: above the dense model, in ``loss_unit``.
        adapters: whether the learned adapters are folded in.
        tensors: one decision per tensor of the checkpoint.
        device: name of the device whose memory was planned for, if it was one.
        options: what the user told the target's converter beyond the model directory (:attr:`Checkpoint.options`).
    """

    format: str
    layout: str
    model: str
    model_fingerprint: str
    scores_sha256: str
    budget_bytes: int
    budget_scope: BudgetScope
    planned_bytes: int
    memory_bytes: int
    files: Mapping[str, int]
    breakdown: Mapping[str, int]
    predicted_loss: float
    predicted_perplexity: float | None
    size_ratio: float
    adapters: bool
    serving: Serving
    certificate: Certificate
    tensors: tuple[TensorDecision, ...]
    notes: tuple[str, ...] = field(default=())
    loss_unit: str = _CAUSAL_UNIT

    @property
    def generates(self) -> bool:
        """Whether the model is a causal one; encoders are ranked by losses of other units."""
        return self.loss_unit == _CAUSAL_UNIT

    device: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def process_bytes(self) -> int:
        """Resident memory of a process that serves the export: ``memory_bytes`` and the runtime itself."""
        return sum(self.breakdown.values())

    @property
    def used_bytes(self) -> int:
        """What counts against the budget."""
        return {"file": self.planned_bytes, "memory": self.memory_bytes, "process": self.process_bytes}[
            self.budget_scope
        ]

    def counts(self, part: str) -> bool:
        """Whether the budget's scope covers this key of the breakdown."""
        if self.budget_scope == "file":
            return part in ("weights", "tokenizer_and_metadata")
        return self.budget_scope == "process" or part not in RUNTIME_PARTS

    def to_json(self) -> dict[str, Any]:
        return {"artifact": "acip-plan", "version": PLAN_VERSION, **dataclasses.asdict(self)}


def save_plan(plan: Plan, file: Path, force: bool = False) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    with claim_output(file, PLAN_KIND, force).new_file() as temporary:
        temporary.write_text(dumps_plan(plan), encoding="utf-8")


def dumps_plan(plan: Plan) -> str:
    """One line a tensor: readable, and a diff shows what changed."""
    data = plan.to_json()
    tensors = data.pop("tensors")
    lines = [json.dumps({k: v for k, v in t.items() if v is not None}) for t in tensors]
    head = json.dumps(data, indent=1)
    return head[:-2] + ',\n "tensors": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def load_plan(file: str | os.PathLike[str]) -> Plan:
    """Read and check a plan.

    Raises:
        PlanFileError: unreadable, unknown version or key, or numbers that contradict each other.
    """
    file = Path(file)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanFileError(f"{file} does not exist; make it with  acip-export plan --budget … -o {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlanFileError(f"{file} cannot be read as JSON: {error}") from error
    return plan_from_json(data, str(file))


def plan_from_json(data: Any, where: str) -> Plan:
    """Build a plan from parsed JSON; ``where`` names its origin in messages."""
    if not isinstance(data, dict) or data.get("artifact") != "acip-plan":
        raise PlanFileError(f"{where} is not a plan: its format is not acip-plan")
    if data.get("version") != PLAN_VERSION:
        raise PlanFileError(f"{where} is a plan of version {data.get('version')}, expected {PLAN_VERSION}; plan again")
    data = {k: v for k, v in data.items() if k not in ("artifact", "version")}
    try:
        data["tensors"] = tuple(_decision_from_json(t) for t in data["tensors"])
        data["serving"] = Serving(**data["serving"])
        data["certificate"] = _certificate_from_json(data["certificate"])
        data["notes"] = tuple(data.get("notes", ()))
        plan = Plan(**data)
        _check(plan)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFileError(f"{where} is damaged or was edited by hand: {error}") from error
    return plan


def _certificate_from_json(data: dict[str, Any]) -> Certificate:
    return Certificate(
        **{
            **data,
            "alternatives": tuple(Alternative(**each) for each in data.get("alternatives", ())),
            "refused_types": tuple(Refusal(**each) for each in data.get("refused_types", ())),
        }
    )


def _decision_from_json(data: dict[str, Any]) -> TensorDecision:
    kept = data.get("kept")
    return TensorDecision(
        **{
            **data,
            "shape": tuple(data["shape"]),
            "kept": None if kept is None else tuple((int(a), int(b)) for a, b in kept),
        }
    )


def decision_bytes(decision: TensorDecision, target: str) -> int:
    """The bytes of a decision by the table in :mod:`acip_export.weight_types`.

    Raises:
        ValueError: the decision contradicts itself, or a row does not fit its format.
        KeyError: unknown format.
    """
    if decision.representation not in _REPRESENTATIONS:
        raise ValueError(f"{decision.name}: unknown representation {decision.representation!r}")
    rows, columns = decision.shape if len(decision.shape) == 2 else (1, decision.shape[0])
    total = 0
    if decision.representation != "factored":
        if decision.type is None:
            raise ValueError(f"{decision.name}: {decision.representation} without a format")
        total += weight_type(target, decision.type).nbytes(rows, columns)
    if decision.representation != "dense":
        if not decision.rank or decision.up_type is None or decision.down_type is None:
            raise ValueError(f"{decision.name}: {decision.representation} without rank and formats")
        total += weight_type(target, decision.up_type).nbytes(rows, decision.rank)
        total += weight_type(target, decision.down_type).nbytes(decision.rank, columns)
    return total


def _check(plan: Plan) -> None:
    for decision in plan.tensors:
        expected = decision_bytes(decision, plan.format)
        if decision.nbytes != expected:
            raise ValueError(f"{decision.name} has nbytes {decision.nbytes}, its decision takes {expected}")
    memory = {name: size for name, size in plan.breakdown.items() if name not in RUNTIME_PARTS}
    for total, parts, what in (
        (plan.planned_bytes, plan.files, "files"),
        (plan.memory_bytes, memory, "breakdown"),
    ):
        if total != sum(parts.values()):
            raise ValueError(f"the {what} add up to {sum(parts.values())} bytes, not {total}")
    if plan.budget_scope not in get_args(BudgetScope):
        raise ValueError(f"unknown budget scope {plan.budget_scope!r}")
    if plan.used_bytes > plan.budget_bytes:
        raise ValueError(f"it uses {plan.used_bytes} bytes of a budget of {plan.budget_bytes}")
