"""Error feedback in blocks of columns, against the algorithm written down plainly, and by threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from acip_export.rounding.error_feedback import Codes, FeedbackFactor, Floats, Grid, round_with_feedback

GROUP = 32


def factor_of(columns: int) -> FeedbackFactor:
    numbers = np.random.default_rng(columns)
    upper = np.triu(numbers.normal(0, 0.05, (columns, columns)), 1) + np.eye(columns)
    return FeedbackFactor.coded(numbers.permutation(columns).astype(np.int32), upper.astype(np.float32))


def weight_and_grid(rows: int, columns: int) -> tuple[Floats, Grid]:
    numbers = np.random.default_rng(rows)
    steps = numbers.uniform(0.2, 0.4, (rows, -(-columns // GROUP))).astype(np.float32)
    return numbers.standard_normal((rows, columns)).astype(np.float32), Grid(steps, GROUP, -8, 7)


def plain(weight: Floats, grid: Grid, factor: FeedbackFactor, row_factor: FeedbackFactor | None = None) -> Codes:
    """One column after the other of one row after the other, in float64."""
    rows = range(len(weight)) if row_factor is None else row_factor.order
    targets, codes = weight.astype(np.float64), np.zeros(weight.shape, np.int8)
    ratios = factor.rows(0, factor.size).astype(np.float64)
    for above, row in enumerate(rows):
        work = targets[row].copy()
        for place, column in enumerate(factor.order):
            step = float(grid.steps[row, column // GROUP])
            codes[row, column] = np.clip(np.rint(work[column] / step), grid.lowest, grid.highest)
            error = work[column] - codes[row, column] * step
            work[factor.order[place + 1 :]] -= error * ratios[place, place + 1 :]
        if row_factor is not None:
            shares = row_factor.rows(above, above + 1)[0, above + 1 :].astype(np.float64)
            targets[row_factor.order[above + 1 :]] -= np.outer(
                shares, targets[row] - codes[row] * np.repeat(grid.steps[row], GROUP)[: len(work)]
            )
    return codes


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# On both sides of the columns and rows whose errors one product carries to all behind and below.
@pytest.mark.parametrize("columns", [1, 127, 129, 300])
@pytest.mark.parametrize("rows", [0, 1, 9, 140])
@pytest.mark.parametrize("carried_down", [False, True])
def test_blocks_are_no_part_of_the_result(rows: int, columns: int, carried_down: bool) -> None:
    (weight, grid), factor = weight_and_grid(rows, columns), factor_of(columns)
    row_factor = factor_of(rows) if carried_down else None
    found = round_with_feedback(weight, grid, factor, row_factor)
    expected = plain(weight, grid, factor, row_factor)
    assert (found.shape, found.dtype) == ((rows, columns), np.int8)
    # Numbers that lie between two codes may go the other way in float32, and what comes behind them too.
    assert int((found != expected).sum()) <= 0.02 * found.size


@pytest.mark.usefixtures("threads")
def test_threads_of_torch_change_no_code() -> None:
    (weight, grid), factor = weight_and_grid(600, 1100), factor_of(1100)
    torch.set_num_threads(1)
    alone = round_with_feedback(weight, grid, factor)
    torch.set_num_threads(3)
    assert np.array_equal(round_with_feedback(weight, grid, factor), alone)
