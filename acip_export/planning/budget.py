"""Budgets, the serving settings that suit them, and the part of them that no choice of tensors changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.plan import BudgetScope, Serving, TensorDecision
from acip_export.formats.targets import Target
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.memory import (
    PROMPT_BATCHES,
    HeldBytes,
    RuntimeMemory,
    choose_prompt_batch,
    held_bytes,
    memory_breakdown,
    runtime_memory,
)
from acip_export.planning.runtime_base import ProcessBase, process_base


@dataclass(frozen=True)
class Budget:
    """A number of bytes, and what they have to hold: all of the process, what it holds for this model, or the files."""

    nbytes: int
    scope: BudgetScope = "memory"


@dataclass(frozen=True)
class ModelMemory:
    """What serving one model in one format takes beside the stored weights.

    Attributes:
        base: the runtime itself and its tokenizer.
    """

    format: Target
    checkpoint: Checkpoint
    base: ProcessBase

    @classmethod
    def of(cls, format_: Target, checkpoint: Checkpoint) -> ModelMemory:
        """Look the runtime's own share up once."""
        return cls(format_, checkpoint, process_base(format_.name, checkpoint))

    def serving(self, serving: Serving) -> RuntimeMemory:
        """Return the bytes of KV cache, compute and output buffers."""
        return runtime_memory(self.format.name, self.checkpoint.shape, serving)

    def fixed(self, scope: BudgetScope, serving: Serving) -> int:
        """Return the bytes of a budget that no choice of tensors changes."""
        memory = self.serving(serving).total
        return {"file": 0, "memory": memory, "process": memory + self.base.total}[scope]

    def running(self, serving: Serving) -> int:
        """Return what is made after loading, in the bytes that loading leaves free."""
        return self.serving(serving).total + self.base.tokenizer

    def held(self, tensors: Sequence[TensorDecision], serving: Serving) -> HeldBytes:
        """Return what the runtime holds of the weights beside the files."""
        return held_bytes(self.format.name, self.checkpoint, tensors, serving)

    def breakdown(self, tensors: Sequence[TensorDecision], file_bytes: int, serving: Serving) -> dict[str, int]:
        """Return everything that the process holds, in bytes by purpose."""
        return memory_breakdown(self.format.name, self.checkpoint, tensors, file_bytes, serving)

    def prompt_batch(self, budget: Budget, longest: Serving) -> int:
        """Return the prompt batch that suits ``budget``, at most that of ``longest``."""
        if budget.scope == "file":
            return min(PROMPT_BATCHES[0], longest.context)
        room = budget.nbytes - (self.base.total if budget.scope == "process" else 0)
        return choose_prompt_batch(self.format.name, self.checkpoint.shape, longest, room)


@dataclass(frozen=True)
class ServingRule:
    """Serving settings that are known before the budget, and how the prompt batch follows from it.

    Attributes:
        prompt_batch: the user's; ``None``: chosen to suit each budget.
        whole_prompts: a prompt batch that is not the user's is the whole context.
    """

    context: int
    cache_type: str
    backend: str
    prompt_batch: int | None = None
    whole_prompts: bool = False

    def serving(self, budget: Budget, memory: ModelMemory) -> Serving:
        """Return the settings that suit ``budget``."""
        longest = Serving(self.context, self.cache_type, self.context, self.backend)
        batch = self.prompt_batch
        if batch is None:
            batch = self.context if self.whole_prompts else memory.prompt_batch(budget, longest)
        return replace(longest, prompt_batch=batch)

    def at_every_budget(self, prompt_batch: int) -> Serving:
        """Return settings that no budget changes, with ``prompt_batch`` where the rule would choose one."""
        batch = self.prompt_batch
        if batch is None:
            batch = self.context if self.whole_prompts else min(prompt_batch, self.context)
        return Serving(self.context, self.cache_type, batch, self.backend)
