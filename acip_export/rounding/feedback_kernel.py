"""The inner loops of error feedback, compiled when they are first called: a second, in every process that rounds.

Everything that knows of numba is here. Its cache on disk is not used: a damaged one would end every command.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_TOGETHER = 8


def _round_tile(
    targets: Floats,
    carried: Floats,
    near: Floats,
    inside: Floats,
    steps: Floats,
    inverses: Floats,
    offsets: Floats,
    levels: Floats,
    middles: Floats,
    lowest: np.float32,
    highest: np.float32,
    groups: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int8],
    errors: Floats,
) -> None:
    """Round some rows of some columns, one weight after the other.

    Args:
        targets: (rows, columns) the weights less what rows before them carried; filled with what they are off by.
        carried: (rows, columns) what columns before these carried; overwritten.
        near: (columns, columns) how errors are carried to the columns behind, zeros elsewhere.
        inside: (rows, rows) how they are carried to the rows below; (0, 0): not at all.
        steps, inverses, offsets: (rows, groups). groups: (columns,) of each column.
        levels, middles: what codes stand for in steps, and what lies between; empty: themselves, up to lowest and
            highest.
        codes: filled. errors: filled with what columns behind are to make up for.
    """
    rows, columns = targets.shape
    # Rows that do not wait for each other are rounded together, so that a processor has something to do meanwhile.
    together = 1 if len(inside) else _TOGETHER
    for first in range(0, rows, together):
        last = min(first + together, rows)
        for row in range(first, last):
            for above in range(row if len(inside) else 0):
                share = inside[above, row]
                for column in range(columns):
                    targets[row, column] -= share * targets[above, column]
            for column in range(columns):
                carried[row, column] = targets[row, column] - carried[row, column]
        for column in range(columns):
            group = groups[column]
            for row in range(first, last):
                step, offset, value = steps[row, group], offsets[row, group], carried[row, column]
                place = (value - offset) * inverses[row, group]
                if len(levels):
                    code = 0
                    for middle in middles:
                        code += place > middle
                    rounded = levels[code] * step
                    codes[row, column] = code
                else:
                    place = min(max(np.rint(place), lowest), highest)
                    rounded = place * step + offset
                    codes[row, column] = np.int8(place)
                error = value - rounded
                errors[row, column] = error
                targets[row, column] -= rounded
                # All of the row: whole vectors are faster than the columns that are left.
                for other in range(columns):
                    carried[row, other] -= error * near[column, other]


# Sums stay in their order; a product and a sum may become one instruction. Other threads run meanwhile.
round_tile: Any = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")(_round_tile)
