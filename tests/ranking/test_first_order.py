"""Zero Sum SVD's estimate and order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acip_export.ranking import rank_model
from acip_export.ranking.algorithms.first_order import zero_sum_scores
from acip_export.ranking.factorized_model import factorize_model
from acip_export.ranking.mask_gradients import first_order_changes
from acip_export.ranking.statistics import collect_statistics
from tests.ranking.support import CALIBRATION, context_of, held_out_loss


def test_estimates_are_the_derivative_of_the_measured_loss(model: Path, text: Path) -> None:
    context = context_of(model, text, windows=32)
    dense, windows = context.model, context.windows
    parts = factorize_model(context, collect_statistics(context), "input")
    changes = first_order_changes(context, parts.layers)
    step = 0.05
    for name in list(parts.layers)[::4]:
        layer = parts.layers[name]
        layer.gated = False
        for component in (0, 5, 20):
            kept = layer.up[:, component].clone()
            losses = []
            for scale in (1 - step, 1 + step):
                layer.up[:, component] = scale * kept
                losses.append(held_out_loss(dense, windows, 8))
            layer.up[:, component] = kept
            measured = (losses[0] - losses[1]) / (2 * step)
            # Central differences of float32 losses: rounding of 1e-6 over the step, and a cubic term.
            assert changes[name][component] == pytest.approx(measured, rel=0.05, abs=1e-4)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=12), min_size=1, max_size=6))
def test_order_is_whole_from_the_tail_and_balanced(changes: list[list[float]]) -> None:
    by_module = {f"m{i}": np.array(values) for i, values in enumerate(changes)}
    singular = {name: np.arange(len(values), 0, -1).astype(np.float32) for name, values in by_module.items()}
    scores = zero_sum_scores(by_module, singular)
    joined = np.concatenate(list(scores.values()))
    np.testing.assert_array_equal(np.sort(joined), np.arange(1, len(joined) + 1))
    places = {name: len(values) for name, values in by_module.items()}
    total = 0.0
    owners = {int(score): (name, i) for name, values in scores.items() for i, score in enumerate(values)}
    for position in range(1, len(joined) + 1):
        name, component = owners[position]
        places[name] -= 1
        assert component == places[name]  # the module's smallest singular value that is left
        offered = [by_module[n][p - (n != name)] for n, p in places.items() if p or n == name]
        change = by_module[name][component]
        fitting = [c for c in offered if (c > 0) == (total <= 0)]
        assert abs(change) == min(abs(c) for c in fitting or offered)
        total += change


def test_ranking_by_first_order_estimates(model: Path, text: Path) -> None:
    ranked = rank_model(model, text, algorithm="first-order", calibration=CALIBRATION)
    assert ranked.basis == "input"
    count = sum(len(module.scores) for module in ranked.modules.values())
    scores = np.concatenate([module.scores for module in ranked.modules.values()])
    np.testing.assert_array_equal(np.sort(scores), np.arange(1, count + 1))
