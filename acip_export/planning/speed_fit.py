"""From runs of models made for it to what a runtime does in a second, and what it takes beside that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from acip_export.artifacts.speeds import RuntimeSpeed

# Rates and overheads are each other's remainders: so often they are computed in turn.
_ROUNDS = 20


@dataclass(frozen=True)
class Timed:
    """A run: seconds a token of a prompt of ``tokens`` and of the answer after it, and what was computed for one.

    Attributes:
        batch: tokens of the prompt that are computed together. nbytes: of matrices.
        weights, head: of the layers' and of the head's. cache: bytes a token of context.
    """

    prompt: float
    answer: float
    tokens: int
    batch: int
    nbytes: int
    weights: int
    head: int
    layers: int
    hidden: int
    cache: float


def fit(
    few: Timed, many: Timed, long: Timed, wide: Timed, by_type: Mapping[str, Timed], base: str, version: str
) -> RuntimeSpeed:
    """Tell apart what runs took: for every type's matrices, for a token, for a layer, for the cache.

    Args:
        few, many: small models of few and many layers of the type ``base``. long: the latter after a long prompt.
        wide: the former with a large vocabulary. by_type: large models.
    """
    layers, context = many.layers - few.layers, long.tokens - many.tokens
    cache_read = many.cache * context / _above_zero(long.answer - many.answer)
    attention = 2 * many.hidden * context * many.layers / _above_zero(long.prompt - many.prompt)
    read = {name: run.nbytes / run.answer for name, run in by_type.items()}
    compute = {name: 2 * run.weights / run.prompt for name, run in by_type.items()}
    token = layer = width = share = 0.0

    def beside(run: Timed) -> float:
        return run.answer - run.nbytes / read[base] - run.cache * run.tokens / cache_read

    def beside_prompt(run: Timed) -> float:
        overhead = (token + run.layers * layer) / run.batch
        attended = 2 * run.hidden * run.tokens * run.layers / attention
        return run.prompt - overhead - attended - 2 * (run.weights + share * run.head) / compute[base]

    for _ in range(_ROUNDS):
        layer = max(0.0, (beside(many) - beside(few)) / layers)
        token = max(0.0, beside(few) - few.layers * layer)
        for name, run in by_type.items():
            rest = run.answer - token - run.layers * layer - run.cache * run.tokens / cache_read
            read[name] = run.nbytes / max(rest, run.answer / 10)
        head = 2 * (wide.head - few.head) / compute[base]
        share = min(1.0, max(0.0, (wide.prompt - few.prompt) / head))
        width = max(0.0, (beside_prompt(many) - beside_prompt(few)) / layers / many.hidden)
        for name, run in by_type.items():
            overhead = (token + run.layers * layer) / run.batch
            attended = 2 * run.hidden * run.tokens * run.layers / attention
            rest = run.prompt - overhead - attended - width * run.hidden * run.layers
            compute[name] = 2 * (run.weights + share * run.head) / max(rest, run.prompt / 10)
    return RuntimeSpeed(version, read, compute, token, layer, width, cache_read, attention, share)


def _above_zero(seconds: float) -> float:
    """What is too short to be measured counts as a nanosecond."""
    return max(seconds, 1e-9)
