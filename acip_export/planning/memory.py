"""What a whole model takes in a runtime, in bytes: the sums over its tensors, by a format's memory model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import Plan, Serving, TensorDecision
from acip_export.formats.protocol import ExportFormat
from acip_export.model.architectures import EMBEDDINGS
from acip_export.model.checkpoint import Checkpoint, ModelShape

PROMPT_BATCHES = (512, 256, 128, 64, 32, 16, 8)


def is_embedding(name: str) -> bool:
    """Tell whether rows of the tensor are looked up."""
    return name.endswith(EMBEDDINGS)


@dataclass(frozen=True)
class HeldBytes:
    """What the runtime holds of a model's weights beside the files.

    Attributes:
        kept: as long as the model is loaded.
        loading: what loading takes beyond what running takes: a matrix is there twice while it is repacked, before
            caches, buffers and tokenizer are; then the tokenizer is built, before caches and buffers are.
    """

    kept: int
    loading: int

    @property
    def total(self) -> int:
        return self.kept + self.loading


def held_bytes(
    export_format: ExportFormat,
    checkpoint: Checkpoint,
    tensors: Sequence[TensorDecision],
    serving: Serving,
    process: str | None = None,
) -> HeldBytes:
    """Add up what is held of a model's weights, in the recommended runtime or in ``process``."""
    memory, tied = export_format.memory, checkpoint.shape.tied_embeddings
    looked_up = [is_embedding(decision.name) for decision in tensors]
    parts = [memory.beside(d, lookup, tied and lookup) for d, lookup in zip(tensors, looked_up, strict=True)]
    base = memory.process(checkpoint, process)
    running = memory.serving(checkpoint.shape, serving).total + base.tokenizer
    kept = sum(part.kept for part in parts) + max(part.once for part in parts)
    return HeldBytes(kept, max(0, max(*(part.loading for part in parts), base.building) - running))


def uncounted_bytes(export_format: ExportFormat, plan: Plan, checkpoint: Checkpoint, process: str) -> int:
    """Return what a process of the runtime ``process`` holds beside the ``memory_bytes`` of ``plan``.

    Its library and tokenizer. One that has a smaller tokenizer than the runtime that was planned for has less to build
    in what loading freed, so that more of that stays on top.
    """
    planned = held_bytes(export_format, checkpoint, plan.tensors, plan.serving).loading
    loading = held_bytes(export_format, checkpoint, plan.tensors, plan.serving, process).loading
    return export_format.memory.process(checkpoint, process).total + loading - planned


def memory_breakdown(
    export_format: ExportFormat,
    checkpoint: Checkpoint,
    tensors: Sequence[TensorDecision],
    file_bytes: int,
    serving: Serving,
) -> dict[str, int]:
    """Everything that a process serving the export holds, in bytes by purpose; docs/memory.md says how."""
    memory, base = export_format.memory.serving(checkpoint.shape, serving), export_format.memory.process(checkpoint)
    held = held_bytes(export_format, checkpoint, tensors, serving)
    stored = sum(decision.nbytes for decision in tensors)
    return {
        "weights": stored,
        "repacked_weights": held.kept,
        "loading": held.loading,
        "tokenizer_and_metadata": file_bytes - stored,
        "kv_cache": memory.kv_cache,
        "compute": memory.compute,
        "output": memory.output,
        "runtime_library": base.library,
        "runtime_tokenizer": base.tokenizer,
    }


def choose_prompt_batch(export_format: ExportFormat, shape: ModelShape, serving: Serving, room: int) -> int:
    """The largest prompt batch whose buffers take at most an eighth of ``room`` bytes.

    Large batches make prompts fast; beyond an eighth of the memory they cost more quality than they save time.
    """
    context = serving.context
    if not shape.generates:
        return context  # a text is computed in one piece
    for batch in PROMPT_BATCHES:
        memory = export_format.memory.serving(shape, replace(serving, prompt_batch=min(batch, context)))
        if memory.compute + memory.output <= room // 8:
            return min(batch, context)
    return min(PROMPT_BATCHES[-1], context)
