"""Quantize to q2_0: blocks of 64 weights, each -1, 0, 1 or 2 times a float16 of either sign (ggml's type 42).

ggml's own quantizer takes the largest weight for the scale, which is right for weights that are -1, 0 and 1 already and
loses a half of others. Here the scale is the best there is for the weighted squared error, whatever its sign.

As the scale falls from infinity, a weight leaves 0 at twice its size and 1 at two thirds of it, and that is all that
changes its code. Between two such scales the codes stay, and the best scale for them has a closed form: the sums that
it is made of are followed through all scales at which a code of the block changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from acip_export.errors import UnsupportedError

BLOCK, LOWEST, HIGHEST = 64, -1, 2
_LEAST = np.finfo(np.float32).tiny

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Return the bytes of ``rows`` (rows, columns), every weight at the nearest of its block's four numbers.

    Args:
        importance: (columns,) positive weights of the squared rounding error.

    Raises:
        UnsupportedError: a weight that no float16 scales to, or that is no number.
    """
    weights = np.ones_like(rows)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes out is not finite
        if importance is not None:  # as ggml weighs it in types of one scale a block
            squares = rows * rows
            weights = importance * np.sqrt(squares.mean(axis=1, keepdims=True) + squares)
        blocks, weights = rows.reshape(-1, BLOCK), weights.reshape(-1, BLOCK)
        # Of size 1, since sums of products leave float32 soon.
        sizes = np.abs(blocks).max(axis=1, keepdims=True)
        within = blocks / np.maximum(sizes, _LEAST)
        weights = weights / np.maximum(weights.max(axis=1, keepdims=True), _LEAST)
        up, down = (_best_scale(sign * within, weights) for sign in (np.float32(1), np.float32(-1)))
        scales = (np.where(up[1] >= down[1], up[0], -down[0]) * sizes[:, 0]).astype(np.float16)
    if not np.isfinite(scales).all():
        raise UnsupportedError("a weight is too large for q2_0, or no number; choose bf16 or f32 for this tensor")
    inverses = np.divide(1, scales, out=np.zeros(scales.shape, np.float32), where=scales != 0, dtype=np.float32)
    codes = np.clip(np.rint(blocks * inverses[:, None]), LOWEST, HIGHEST).astype(np.int8) - LOWEST
    found = np.empty((len(blocks), 2 + BLOCK // 4), np.uint8)
    found[:, :2] = scales[:, None].view(np.uint8)
    found[:, 2:] = pack(codes.astype(np.uint8))
    return found.reshape(-1)


def pack(codes: Bytes) -> Bytes:
    """Pack codes (n, 64) of 0 to 3: four neighbours in a byte, the first lowest."""
    shifted = codes.reshape(len(codes), -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=2)
    return packed


def _best_scale(blocks: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the best positive scale of every block, and how far it takes the weighted squares down, (blocks,) each.

    With codes q, the scale d that is best for weights x is sum(x q) / sum(q q), and takes sum(x q)^2 / sum(q q) away.
    """
    sizes = np.abs(blocks)
    # Two scales for each weight: where it leaves 0, and where it leaves 1. Negative ones stay at -1.
    turns = np.concatenate([2 * sizes, np.maximum(blocks, 0) * np.float32(2 / 3)], axis=1)
    products = weights * sizes
    products = np.concatenate([products, np.where(blocks > 0, products, 0)], axis=1)
    squares = np.concatenate([weights, np.where(blocks > 0, 3 * weights, 0)], axis=1)
    order = np.argsort(-turns, axis=1)
    products, squares = (np.take_along_axis(each, order, 1).cumsum(axis=1) for each in (products, squares))
    gains = products * products / np.maximum(squares, _LEAST)
    best = gains.argmax(axis=1)[:, None]
    chosen = (np.take_along_axis(each, best, 1)[:, 0] for each in (products, squares, gains))
    product, square, gain = chosen
    return product / np.maximum(square, _LEAST), gain
