"""Rank correlation, against figures worked out by hand and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from acip_export.model.embedding_similarity import spearman


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826817),
        ([1, 1, 2], [1, 2, 3], 0.8660254038),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0),
        ([0, 0, 0, 5], [1, 1, 1, 9], 1),
        ([106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
    ],
)
def test_known_values(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(np.array(a, float), np.array(b, float)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_ties_are_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    assume(a.min() < a.max() and b.min() < b.max())
    assert spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic), abs=1e-12)


@pytest.mark.parametrize("nothing", [[1.0, 1.0, 1.0], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
def test_ranks_that_say_nothing(nothing: list[float]) -> None:
    assert np.isnan(spearman(np.array(nothing), np.array([1.0, 2.0, 3.0])))
