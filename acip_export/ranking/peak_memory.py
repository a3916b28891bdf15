"""Count the memory that the phases of a ranking take, from the sizes of a model; pages of mapped files don't count.

Each count names what is there at the same time. Whatever changes that in a phase changes its count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from acip_export.model.shape import ModelShape
from acip_export.ranking.block_sizes import BlockSizes
from acip_export.ranking.layer_memory import (
    Shape,
    components_bytes,
    factors_bytes,
    gradient_packing_bytes,
    packing_bytes,
)
from acip_export.ranking.side_by_side import at_once

# Measured (docs/LOG.md): Python, torch and transformers, what is left of a tokenizer by its tokens, and buffers of what
# multiplies matrices with holes of the heap by the model's width.
_LIBRARIES, _LEFT_BY_TOKEN, _BY_COLUMN = 360_000_000, 350, 40_000
# While text is read: what is there without a model, a tokenizer by its tokens, a megabyte of text in one document.
_NO_MODEL, _BY_TOKEN, _TEXT = 300_000_000, 1_100, 270_000_000
# Logits that are there at once, and what each has beside itself: its probability, the square of that, a difference.
_LOGITS_AT_ONCE, _BY_LOGIT = 2**24, 12
# Arrays as large as the logits while a learned ranking goes backward.
_LOGITS_LEARNING = 9
_Work = TypeVar("_Work")


@dataclass(frozen=True)
class Held:
    """Hold how the numbers of a loaded model are there.

    Attributes:
        linear, others: bytes of memory of each number of the linear layers, and of embedding and head; 0 where they are
            mapped from their file.
        factor: bytes of a number of the factors. computed: of a number that the model computes.
    """

    linear: int
    others: int
    factor: int
    computed: int


@dataclass(frozen=True)
class Passes:
    """Hold how texts pass through the model: tokens at a time, tokens that go backward, tokens of the curve."""

    batch: int
    graded: int
    curve: int


def peak_by_phase(
    shape: ModelShape, blocks: Sequence[BlockSizes], held: Held, passes: Passes, threads: int
) -> dict[str, int]:
    """Return the peak of each phase of a training-free ranking, in bytes of the process."""
    hidden = shape.hidden
    always = unranked_bytes(shape, blocks, held)
    entered = 4 * hidden * passes.graded
    # Of head and embedding.
    outside = 4 * hidden * hidden
    layers = [layer for block in blocks for layer in block.shapes]
    batch, of_curve = min(passes.batch, passes.graded), min(passes.batch, passes.curve)

    def logits(tokens: int) -> int:
        return max(shape.vocabulary, min(_LOGITS_AT_ONCE, tokens * shape.vocabulary))

    def most(count: Callable[[BlockSizes], int]) -> int:
        return max(map(count, blocks))

    def of_gradients(block: BlockSizes) -> int:
        return 4 * block.squares[1]

    return {
        "text": _NO_MODEL + _BY_TOKEN * shape.vocabulary + _TEXT,
        "forward": always + entered + most(lambda b: 4 * b.squares[0] + _activations(b, hidden, passes.batch) // 2),
        "inputs": always + entered + most(lambda b: 4 * b.squares[0] + _together(b.inputs, packing_bytes, threads)),
        "head": always + entered + outside + 16 * hidden * batch + (_BY_LOGIT + held.computed) * logits(batch),
        "backward": always + entered + outside + most(lambda b: of_gradients(b) + _activations(b, hidden, batch)),
        "gradients": always
        + entered
        + outside
        + most(lambda b: of_gradients(b) + _together(b.shapes, gradient_packing_bytes, threads)),
        "components": always + _together(layers, components_bytes, threads, lambda s: factors_bytes(s, 4)),
        "fisher": always + min(threads, len(layers)) * max(_fisher(s, held, passes) for s in layers),
        "curve": always
        + most(lambda b: held.factor * (b.factors + max(factors_bytes(s, 1) for s in b.shapes)))
        + max(most(lambda b: _activations(b, hidden, of_curve) // 2), 2 * 4 * logits(of_curve)),
    }


def unranked_bytes(shape: ModelShape, blocks: Sequence[BlockSizes], held: Held) -> int:
    """Return what is there all the time: libraries and a loaded model."""
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied_embeddings else 2)
    weights = embeddings * held.others + sum(b.weights for b in blocks) * held.linear
    return _LIBRARIES + _LEFT_BY_TOKEN * shape.vocabulary + _BY_COLUMN * shape.hidden + weights


def learning_bytes(blocks: Sequence[BlockSizes], shape: ModelShape, held: Held, tokens: int, batch: int) -> int:
    """Return what a learned ranking takes: all factors, and activations of all blocks for one batch of ``tokens``."""
    kept = sum(b.width + sum(min(s) for s in b.shapes) + 8 * shape.hidden for b in blocks)
    always = unranked_bytes(shape, blocks, held) + sum(b.factors for b in blocks) * held.factor
    return always + 4 * _LOGITS_LEARNING * min(_LOGITS_AT_ONCE, batch * shape.vocabulary) + 4 * tokens * kept


def _activations(block: BlockSizes, hidden: int, tokens: int) -> int:
    """Return what the activations of a block take with their gradients, and those of the embedding in float64."""
    return 4 * tokens * (2 * block.width + 2 * hidden)


def _nothing(_work: object) -> int:
    return 0


def _together(
    works: Sequence[_Work], count: Callable[[_Work], int], threads: int, result: Callable[[_Work], int] = _nothing
) -> int:
    """Return the peak of :func:`acip_export.ranking.side_by_side.side_by_side`: of works that follow each other.

    A work takes more than its result, so most is taken while all threads work: whoever asked still has the result
    before, and of the works that have begun, one more than there are threads, one is done. Where there are no more
    works than threads, none is; a thread alone begins nothing ahead.
    """
    sizes, results = [count(work) for work in works], [result(work) for work in works]
    workers = at_once(max(sizes), threads)
    peaks = []
    for begin in range(len(works)):
        ahead = slice(begin, begin + (workers + 1 if workers > 1 else 1))
        done = max(results[ahead]) if len(sizes[ahead]) > workers else 0
        before = results[begin - 1] if begin else 0
        peaks.append(sum(sorted(sizes[ahead])[-workers:]) + done + before)
    return max(peaks)


def _fisher(shape: Shape, held: Held, passes: Passes) -> int:
    by_token = 6 * sum(shape) + 8 * min(shape)
    return factors_bytes(shape, 4 if held.factor == 4 else 4 + held.factor) + passes.batch * by_token
