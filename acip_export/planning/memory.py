"""What a whole model takes in a runtime, in bytes: the sums over its tensors, by a format's memory model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from acip_export.artifacts.plan import BudgetScope, Plan, Serving, TensorDecision
from acip_export.formats.protocol import COUNTED_THREADS, ExportFormat, Hole, ProcessBase, ServingMemory, TensorMemory
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import is_embedding


@dataclass(frozen=True)
class HeldBytes:
    """What the runtime holds of a model's weights beside the files.

    Attributes:
        kept: as long as the model is loaded.
        loading: what loading takes beyond what running takes: a matrix is there twice while it is repacked, before
            caches, buffers and tokenizer are; then the tokenizer is built, before caches and buffers are.
        hole: what buffers leave behind where they lie on the heap, as the weights decide.
    """

    kept: int
    loading: int
    hole: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.kept + self.loading + self.hole


@dataclass(frozen=True)
class Running:
    """What is made after loading, in the bytes that loading leaves free.

    Attributes:
        nbytes: whatever is chosen. hole: as what is chosen decides.
    """

    nbytes: int
    hole: Hole

    def held(self, loading: int, heap_block: int) -> tuple[int, int]:
        """Return what loading takes beyond all of it, and the bytes of the hole.

        Args:
            loading, heap_block: the largest of any tensor.
        """
        hole = self.hole.left_by(heap_block)
        return max(0, loading - self.nbytes - hole), hole


@dataclass(frozen=True)
class ModelMemory:
    """What serving one model in one format takes beside the stored weights.

    Attributes:
        base: the process of the runtime itself, and its tokenizer.
    """

    format: ExportFormat
    checkpoint: Checkpoint
    base: ProcessBase

    @classmethod
    def of(cls, format: ExportFormat, checkpoint: Checkpoint, runtime: str | None = None) -> ModelMemory:
        """Look up what the runtime itself holds; ``None``: the one that plans are made for."""
        return cls(format, checkpoint, format.memory.process(checkpoint, runtime))

    def serving(self, serving: Serving) -> ServingMemory:
        """Return the bytes of KV cache, compute and output buffers."""
        return self.format.memory.serving(self.checkpoint.shape, serving)

    def running(self, serving: Serving) -> Running:
        """Return what is made after loading, in the bytes that loading leaves free."""
        memory = self.serving(serving)
        return Running(memory.total + self.base.tokenizer, memory.hole if self.base.holes else Hole())

    def fixed(self, scope: BudgetScope, serving: Serving) -> int:
        """Return the bytes of a budget that no choice of tensors changes."""
        memory = self.serving(serving).total
        anonymous = memory + self.base.heap + self.base.tokenizer
        return {"file": 0, "memory": memory, "anonymous": anonymous, "process": memory + self.base.total}[scope]

    def held(self, tensors: Sequence[TensorDecision], serving: Serving) -> HeldBytes:
        """Add up what is held of the model's weights beside the files."""
        return self._held(self.format.memory.beside, tensors, serving)

    def held_anonymous(self, tensors: Sequence[TensorDecision], serving: Serving) -> HeldBytes:
        """Add up what is held of the model's weights in memory that no file backs."""
        return self._held(self.format.memory.anonymous, tensors, serving)

    def _held(
        self,
        of_tensor: Callable[[TensorDecision, bool, bool], TensorMemory],
        tensors: Sequence[TensorDecision],
        serving: Serving,
    ) -> HeldBytes:
        tied = self.checkpoint.shape.tied_embeddings
        looked_up = [is_embedding(decision.name) for decision in tensors]
        parts = [
            of_tensor(decision, lookup, tied and lookup) for decision, lookup in zip(tensors, looked_up, strict=True)
        ]
        kept = sum(part.kept for part in parts) + max(part.once for part in parts)
        loading = max(*(part.loading for part in parts), self.base.building)
        return HeldBytes(kept, *self.running(serving).held(loading, max(part.heap_block for part in parts)))

    def breakdown(self, tensors: Sequence[TensorDecision], file_bytes: int, serving: Serving) -> dict[str, int]:
        """Return everything that the process holds, in bytes by purpose; docs/memory.md says how."""
        memory, held = self.serving(serving), self.held(tensors, serving)
        stored = sum(decision.nbytes for decision in tensors)
        return {
            "weights": stored,
            "repacked_weights": held.kept,
            "loading": held.loading,
            "tokenizer_and_metadata": file_bytes - stored,
            "kv_cache": memory.kv_cache,
            "compute": memory.compute,
            "output": memory.output + held.hole,
            "runtime_library": self.base.library,
            "runtime_tokenizer": self.base.tokenizer,
        }

    def anonymous(self, tensors: Sequence[TensorDecision], serving: Serving) -> dict[str, int]:
        """Return, of each part of :meth:`breakdown`, what the system cannot drop."""
        memory, held = self.serving(serving), self.held_anonymous(tensors, serving)
        copied = min(held.kept, sum(decision.nbytes for decision in tensors))
        return {
            "weights": copied,
            "repacked_weights": held.kept - copied,
            "loading": held.loading,
            "tokenizer_and_metadata": 0,
            "kv_cache": memory.kv_cache,
            "compute": memory.compute,
            "output": memory.output + held.hole,
            "runtime_library": self.base.heap,
            "runtime_tokenizer": self.base.tokenizer,
        }


def uncounted_bytes(format: ExportFormat, plan: Plan, checkpoint: Checkpoint, process: str) -> int:
    """Return what a process of the runtime ``process`` holds beside the ``memory_bytes`` of ``plan``.

    Its library and tokenizer. One that has a smaller tokenizer than the runtime that was planned for has less to build
    in what loading freed, so that more of that stays on top; it may leave no hole either.
    """
    planned, actual = ModelMemory.of(format, checkpoint), ModelMemory.of(format, checkpoint, process)
    more = actual.held(plan.tensors, plan.serving).total - planned.held(plan.tensors, plan.serving).total
    return actual.base.total + more


def thread_bytes(format: ExportFormat, plan: Plan, checkpoint: Checkpoint, threads: int) -> int:
    """Return what a process holds with so many threads beyond those that plans count; the system cannot drop it."""
    return max(0, threads - COUNTED_THREADS) * format.memory.thread(checkpoint.shape, plan.serving, plan.tensors)


def anonymous_bytes(format: ExportFormat, plan: Plan, checkpoint: Checkpoint, process: str) -> int:
    """Return what a process of the runtime ``process`` holds that the system cannot drop."""
    memory = ModelMemory.of(format, checkpoint, process)
    return sum(memory.anonymous(plan.tensors, plan.serving).values())
