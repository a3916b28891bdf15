"""Compute a machine's speeds from timed runs: bytes and operations a second, and what a token costs beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from acip_export.artifacts.speeds import CacheSpeed, LayerSpeed, MatrixSpeed, RuntimeSpeed

# Rates of matrices follow from the time that overheads leave, and overheads from the time that matrices leave. Each is
# computed from the other so many times.
_ROUNDS = 50
# A disturbed run of a small model looks like overhead, which would be taken off the time of the large models and make
# their types too fast. So at least one part in so many of a large model's time counts as that of its matrices.
_LEAST_SHARE = 2


@dataclass(frozen=True)
class Timed:
    """What one model took to read a prompt and to answer, and how much there was to compute for it.

    Attributes:
        prompt: seconds per token of the prompt.
        answer: seconds per token of the answer.
        tokens: length of the prompt.
        batch: tokens of the prompt that are computed together.
        nbytes: bytes of all matrices.
        weights: numbers in the matrices of the layers.
        head: numbers in the matrix of the head.
        layers: how many there are.
        hidden: width of the model.
        cache: bytes of the KV cache per token of context.
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
    *,
    few_layers: Timed,
    many_layers: Timed,
    narrow: Timed,
    short_prompt: Timed,
    long_prompt: Timed,
    large_vocabulary: Timed,
    by_type: Mapping[str, Sequence[Timed]],
    caches: Mapping[str, Timed],
    base: str,
    version: str,
) -> RuntimeSpeed:
    """Tell apart how long the matrices of each type, a token, a layer and the cache take.

    Args:
        few_layers: a small model of the type ``base``.
        many_layers: the same with more layers.
        narrow: a model of many layers whose matrices are read from memory.
        short_prompt, long_prompt: another model of many layers, after both.
        large_vocabulary: the model of few layers, with a larger vocabulary.
        by_type: models of several sizes, for each type.
        caches: as ``long_prompt``, with KV caches of other types.
        base: the type of the small models.
        version: of the runtime.
    """
    few, many = few_layers, many_layers
    more_layers, more_context = many.layers - few.layers, long_prompt.tokens - short_prompt.tokens
    cache_read = short_prompt.cache * more_context / _above_zero(long_prompt.answer - short_prompt.answer)
    more_attention = 2 * short_prompt.hidden * more_context * short_prompt.layers
    attention = more_attention / _above_zero(long_prompt.prompt - short_prompt.prompt)
    matrices = {name: tuple(map(_at_first, runs)) for name, runs in by_type.items()}
    layers = (LayerSpeed(many.nbytes, 0.0), LayerSpeed(narrow.nbytes, 0.0))
    # What is told apart, by what is known so far of the rest.
    found = RuntimeSpeed(version, matrices, 0.0, layers, 0.0, cache_read, attention, 0.0)
    for _ in range(_ROUNDS):
        beside_few, beside_many, beside_narrow = (_beside_matrices(run, found, base) for run in (few, many, narrow))
        layer = max(0.0, (beside_many - beside_few) / more_layers)
        token = max(0.0, beside_few - few.layers * layer)
        narrow_layer = max(layer, (beside_narrow - token) / narrow.layers)
        # How far the head is computed for all tokens of a prompt, a larger vocabulary tells.
        more_head = 2 * (large_vocabulary.head - few.head)
        more_seconds = large_vocabulary.prompt - few.prompt
        share = min(1.0, max(0.0, more_seconds * found.matrix(base, few.nbytes).compute / more_head))
        found = replace(
            found,
            token_seconds=token,
            layers=(LayerSpeed(many.nbytes, layer), LayerSpeed(narrow.nbytes, narrow_layer)),
            head_share=share,
        )
        rest_few, rest_many = (
            _prompt_rest(run, found) - 2 * (run.weights + share * run.head) / found.matrix(base, run.nbytes).compute
            for run in (few, many)
        )
        found = replace(found, width_seconds=max(0.0, (rest_many - rest_few) / more_layers / many.hidden))
        found = replace(found, matrices={n: tuple(_matrix_speed(run, found) for run in r) for n, r in by_type.items()})
    by_cache = {name: _cache_speed(run, short_prompt, cache_read, attention) for name, run in caches.items()}
    return replace(found, caches=by_cache)


def _beside_matrices(run: Timed, speeds: RuntimeSpeed, type_: str) -> float:
    """Return what a token of an answer takes beside the matrices, all of one type, and the cache."""
    read = run.nbytes / speeds.matrix(type_, run.nbytes).read
    return run.answer - read - run.cache * run.tokens / speeds.cache_read


def _matrix_speed(run: Timed, speeds: RuntimeSpeed) -> MatrixSpeed:
    """Return the speeds of a model's matrices, from what is left of its times beside everything else."""
    fixed = speeds.token_seconds + run.layers * speeds.layer_seconds(run.nbytes)
    answer = run.answer - fixed - run.cache * run.tokens / speeds.cache_read
    prompt = _prompt_rest(run, speeds) - speeds.width_seconds * run.hidden * run.layers
    return MatrixSpeed(
        run.nbytes,
        run.nbytes / max(answer, run.answer / _LEAST_SHARE),
        2 * (run.weights + speeds.head_share * run.head) / max(prompt, run.prompt / _LEAST_SHARE),
    )


def _at_first(run: Timed) -> MatrixSpeed:
    """Return a model's speeds as if its matrices took all of its times."""
    return MatrixSpeed(run.nbytes, run.nbytes / run.answer, 2 * run.weights / run.prompt)


def _cache_speed(run: Timed, short: Timed, cache_read: float, attention: float) -> CacheSpeed:
    """Return the speeds of the cache that ``run`` had, from what it took beyond the same model with a short prompt.

    Args:
        short: with a cache of the format's own type, which ``cache_read`` and ``attention`` are of.
    """
    without_cache = short.answer - short.cache * short.tokens / cache_read
    without_attention = short.prompt - 2 * short.hidden * short.tokens * short.layers / attention
    nbytes, operations = run.cache * run.tokens, 2 * run.hidden * run.tokens * run.layers
    # What is read in less than half of the time of the own type's bytes, a disturbed run made so.
    read = nbytes / max(run.answer - without_cache, nbytes / cache_read / _LEAST_SHARE)
    rest = max(run.prompt - without_attention, operations / attention / _LEAST_SHARE)
    return CacheSpeed(read, operations / rest)


def _prompt_rest(run: Timed, speeds: RuntimeSpeed) -> float:
    """Return the seconds per token of a prompt without attention and without what a batch takes whatever its length."""
    attended = 2 * run.hidden * run.tokens * run.layers / speeds.attention
    fixed = speeds.token_seconds + run.layers * speeds.layer_seconds(run.nbytes)
    return run.prompt - fixed / run.batch - attended


def _above_zero(seconds: float) -> float:
    """Count what is too short to be measured as a nanosecond."""
    return max(seconds, 1e-9)
