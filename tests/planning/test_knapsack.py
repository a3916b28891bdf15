from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from acip_export.planning.knapsack import Choices, allocate, pareto

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
    assert found.proven
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


def highs(groups: list[Choices], capacity: int) -> float:
    """The least loss by an independent solver, over the Pareto fronts."""
    fronts = [pareto(group) for group in groups]
    owner = np.concatenate([np.full(len(front), g) for g, front in enumerate(fronts)])
    nbytes, loss = (
        np.concatenate([getattr(group, name)[front] for group, front in zip(groups, fronts, strict=True)])
        for name in ("nbytes", "loss")
    )
    unit = 4096  # small whole numbers: the solver's tolerances are absolute
    assert not (nbytes % unit).any()
    each = (owner == np.arange(len(groups))[:, None]).astype(float)
    result = milp(
        loss,
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(each, 1, 1), LinearConstraint(nbytes[None] / unit, 0, capacity // unit)],
        options={"mip_rel_gap": 1e-9},
    )
    return float(loss[np.concatenate([result.x[owner == g] > 0.5 for g in range(len(groups))])].sum())


@pytest.mark.parametrize("seed", range(12))
def test_equals_an_independent_solver(seed: int) -> None:
    """As many layers as small models have, some of them of few sizes and alike, as layers of a model are."""
    draw = np.random.default_rng(seed)
    sizes = [np.sort(draw.choice(400, 12, replace=False)) * 4096 for _ in range(3)]
    groups = [
        Choices(sizes[g % 3] if seed % 2 else np.sort(draw.integers(1, 400, 12)) * 4096, curve)
        for g, curve in enumerate(np.round(np.sort(draw.exponential(1, (40, 12)))[:, ::-1], 3))
    ]
    low, high = (sum(int(pick(g.nbytes)) for g in groups) for pick in (np.min, np.max))
    capacity = int(low + draw.uniform(0.05, 0.9) * (high - low))
    found = allocate(groups, capacity)
    assert found is not None
    assert found.proven
    # HiGHS stops within 1e-6 of the best by default in absolute terms; losses are whole thousandths.
    assert round(found.loss, 3) == round(highs(groups, capacity), 3)


def test_a_search_that_runs_out_of_states_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    groups = [Choices(np.sort(draw.integers(1, 4000, 12)), np.sort(draw.exponential(1, 12))[::-1]) for _ in range(20)]
    best = allocate(groups, 20_000)
    monkeypatch.setattr("acip_export.planning.knapsack_exact._FEW", 2)
    monkeypatch.setattr("acip_export.planning.knapsack_exact._MANY", 3)
    found = allocate(groups, 20_000)
    assert best is not None and found is not None
    assert best.proven and not found.proven
    assert best.lower_bound == found.lower_bound <= best.loss <= found.loss
    assert found.nbytes <= 20_000


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
