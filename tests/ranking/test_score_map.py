"""Score map, ties and the order of components."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from acip_export.lowrank.order import GlobalOrder
from acip_export.ranking.score_map import broken_ties, update_score_map


def test_score_map_follows_the_paper() -> None:
    scores = np.array([0.02, 0.02, 0.02], np.float32)
    masks = [[0.01, -0.01, 0.02], [0.0, -0.02, 0.01], [-0.01, -0.02, 0.005]]
    for mask in masks:
        scores = update_score_map(scores, np.array(mask, np.float32))
    # Alive: its mask. Pruned in step 2: 0, then -1. Pruned in step 1: 0, then -1, -2.
    np.testing.assert_array_equal(scores, np.array([-1, -2, 0.005], np.float32))


@given(
    hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(-5000, 1)),
    st.integers(0, 2**32 - 1),
)
def test_ties_are_broken_by_predicted_loss_and_nothing_else_moves(steps: np.ndarray, seed: int) -> None:
    score_map = np.where(steps > 0, 0.01, steps).astype(np.float32)
    losses = np.random.default_rng(seed).lognormal(size=len(steps))
    half = len(steps) // 2
    parts = {"a": score_map[:half], "b": score_map[half:]}
    final = broken_ties(parts, {"a": losses[:half], "b": losses[half:]})
    scores = np.concatenate([final["a"], final["b"]])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores[steps > 0], np.float32(0.01))
    pruned = steps <= 0
    assert (scores[pruned] < 0).all() and (np.floor(scores[pruned]) == steps[pruned] - 1).all()
    # Fewer than 2**10 components in a step that lies less than 2**13 steps back: float32 tells all of them apart.
    assert len(np.unique(scores[pruned])) == pruned.sum()
    order = np.argsort(scores[pruned])
    np.testing.assert_array_equal(order, np.lexsort((losses[pruned], steps[pruned])))


def test_ties_beyond_float32_stay_in_their_step() -> None:
    score_map = np.full(2**15, -5000, np.float32)
    final = broken_ties({"m": score_map}, {"m": np.random.default_rng(0).random(2**15)})["m"]
    assert final.min() >= -5001 and final.max() < -5000


@pytest.mark.parametrize("seed", range(3))
def test_ranks_drop_one_component_at_a_time(seed: int) -> None:
    """Against the rule, step by step."""
    generator = np.random.default_rng(seed)
    shapes = {"l.10.a": (12, 20), "l.2.a": (16, 16), "l.2.b": (30, 8)}
    # Rounded, so that modules tie with each other.
    scores = {name: generator.normal(size=min(shape)).round(1).astype(np.float32) for name, shape in shapes.items()}
    total = sum(m * n for m, n in shapes.values())
    by_module = [(value, name) for name in ("l.2.a", "l.2.b", "l.10.a") for value in scores[name]]
    order = GlobalOrder(scores, shapes)
    for ratio in np.linspace(0, 1, 23):
        ranks = {name: min(shape) for name, shape in shapes.items()}
        for _, name in sorted(by_module, key=lambda unit: unit[0]):
            if sum(min(r * sum(shapes[n]), shapes[n][0] * shapes[n][1]) for n, r in ranks.items()) <= ratio * total:
                break
            ranks[name] -= 1
        assert order.ranks_at(ratio) == ranks
