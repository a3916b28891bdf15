from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_export.plan.allocate import Choices, allocate, pareto

groups_of = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=5), min_size=1, max_size=5
)


def _choices(raw: list[list[tuple[int, int]]]) -> list[Choices]:
    return [Choices(np.array([b for b, _ in g], np.int64), np.array([x for _, x in g], np.float64)) for g in raw]


@settings(max_examples=150, deadline=None)
@given(groups_of, st.integers(0, 300))
def test_equals_brute_force(raw: list[list[tuple[int, int]]], capacity: int) -> None:
    feasible = [
        sum(loss for _, loss in choice) for choice in product(*raw) if sum(size for size, _ in choice) <= capacity
    ]
    found = allocate(_choices(raw), capacity)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert found.nbytes <= capacity
    assert found.loss == min(feasible)
    assert found.lower_bound <= found.loss + 1e-9
    chosen = [group[c] for group, c in zip(raw, found.chosen, strict=True)]
    assert (sum(b for b, _ in chosen), sum(x for _, x in chosen)) == (found.nbytes, found.loss)


@settings(max_examples=60, deadline=None)
@given(groups_of, st.integers(0, 300), st.integers(0, 50))
def test_a_larger_budget_is_never_worse(raw: list[list[tuple[int, int]]], capacity: int, more: int) -> None:
    small, large = allocate(_choices(raw), capacity), allocate(_choices(raw), capacity + more)
    if small is not None:
        assert large is not None
        assert large.loss <= small.loss


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=12))
def test_pareto_front_beats_or_equals_everything(raw: list[tuple[int, int]]) -> None:
    (choices,) = _choices([raw])
    front = [raw[i] for i in pareto(choices)]
    assert all(any(b <= size and x <= loss for b, x in front) for size, loss in raw)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))


def test_large_instance_meets_its_bound() -> None:
    """The shape of a 7B model: the gap to the bound is less than one upgrade of one layer in two hundred."""
    draw = np.random.default_rng(0)
    groups = [
        Choices(np.sort(draw.integers(1, 2000, 30)) * 4096, np.sort(draw.exponential(1, 30))[::-1].copy())
        for _ in range(224)
    ]
    low, high = (sum(int(pick(g.nbytes)) for g in groups) for pick in (np.min, np.max))
    for share in (0.1, 0.5, 0.9):
        capacity = int(low + share * (high - low))
        found = allocate(groups, capacity)
        assert found is not None
        assert found.nbytes <= capacity
        assert found.loss - found.lower_bound <= found.loss / 200
