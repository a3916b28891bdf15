"""Budgets, and the serving settings that suit them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from acip_export.artifacts.plan import BudgetScope, Serving
from acip_export.planning.memory import ModelMemory

# Contexts that are looked for are multiples of it: llama.cpp's caches are.
CONTEXT_STEP = 256
# The prompt batches that are chosen from, the largest first.
_PROMPT_BATCHES = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Budget:
    """A number of bytes, and what they have to hold: all of the process, what of it the system cannot drop, what it
    holds for this model, or the files."""

    nbytes: int
    scope: BudgetScope = "memory"


@dataclass(frozen=True)
class ServingRule:
    """Serving settings that are known before the budget, and how the prompt batch follows from it.

    Attributes:
        cache_type_k, cache_type_v: as those of :class:`~acip_export.artifacts.plan.Serving`.
        prompt_batch: the user's; ``None``: chosen to suit each budget.
        whole_prompts: a prompt batch that is not the user's is the whole context.
        longest: the context is the longest up to ``context`` whose plan loses at most ``most_loss``; see
            :func:`acip_export.planning.context.settled`.
    """

    context: int
    cache_type_k: str
    backend: str
    prompt_batch: int | None = None
    whole_prompts: bool = False
    cache_type_v: str = ""
    longest: bool = False
    most_loss: float | None = None

    @property
    def least(self) -> ServingRule:
        """The rule with the shortest context that it may mean."""
        return replace(self, context=min(CONTEXT_STEP, self.context), longest=False) if self.longest else self

    def serving(self, budget: Budget, memory: ModelMemory) -> Serving:
        """Return the settings that suit ``budget``."""
        longest = Serving(self.context, self.cache_type_k, self.context, self.backend, self.cache_type_v)
        batch = self.prompt_batch
        if batch is None:
            batch = self.context if self.whole_prompts else _prompt_batch(budget, memory, longest)
        return replace(longest, prompt_batch=batch)

    def at_every_budget(self, prompt_batch: int) -> Serving:
        """Return settings that no budget changes, with ``prompt_batch`` where the rule would choose one."""
        batch = self.prompt_batch
        if batch is None:
            batch = self.context if self.whole_prompts else min(prompt_batch, self.context)
        return Serving(self.context, self.cache_type_k, batch, self.backend, self.cache_type_v)


def _prompt_batch(budget: Budget, memory: ModelMemory, longest: Serving) -> int:
    """Return the largest prompt batch whose buffers take at most an eighth of the budget.

    Large batches make prompts fast; beyond an eighth of the memory they cost more quality than they save time.
    """
    batches = [min(batch, longest.context) for batch in _PROMPT_BATCHES]
    if budget.scope == "file":
        return batches[0]
    own = {"process": memory.base.total, "anonymous": memory.base.heap + memory.base.tokenizer}
    room = budget.nbytes - own.get(budget.scope, 0)
    for batch in batches:
        buffers = memory.serving(replace(longest, prompt_batch=batch))
        if buffers.compute + buffers.output + buffers.hole.nbytes <= room // 8:
            return batch
    return batches[-1]
