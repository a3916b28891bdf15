"""The losses of dropping components add up to what the ranking measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from acip_export.artifacts.scores import CurvePoint, ScoreFile
from acip_export.planning.losses import component_losses, isotonic, measured_cuts
from tests.support import make_model, make_scores

MEASURED = {1.0: 3.0, 0.8: 3.05, 0.6: 3.3, 0.4: 4.1, 0.2: 6.0}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> ScoreFile:
    made = make_scores(make_model(tmp_path_factory.mktemp("models") / "tiny"))
    # Estimates of the size of what is measured; a factor of several is left to the scale.
    modules = {name: replace(m, drop_loss=m.drop_loss * np.float32(0.5)) for name, m in made.modules.items()}
    total = sum(float(m.drop_loss.sum()) for m in modules.values())
    curve = tuple(CurvePoint(ratio, 3 + (loss - 3) * total / 3) for ratio, loss in MEASURED.items())
    return replace(made, modules=modules, curve=curve)


@given(st.lists(st.floats(-1, 1) | st.integers(-2, 2), min_size=1, max_size=40))
def test_the_monotone_fit_is_the_least_squares_one(values: list[float]) -> None:
    assert isotonic(np.array(values, float)) == pytest.approx(isotonic_regression(values).x, abs=1e-12)


def _cut(scores: ScoreFile, ratio: float) -> dict[str, np.ndarray]:
    ranks = scores.ranks_at(ratio)
    smaller = {n for n, m in scores.modules.items() if ranks[n] * sum(m.shape) < m.shape[0] * m.shape[1]}
    return {name: scores.modules[name].order[ranks[name] :] for name in smaller}


def test_every_cut_costs_what_it_was_measured_to_cost(scores: ScoreFile) -> None:
    losses = component_losses(scores)
    for point in scores.curve[1:]:
        estimate = sum(float(losses[name][units].sum()) for name, units in _cut(scores, point.ratio).items())
        measured = point.loss - scores.curve[0].loss
        assert estimate == pytest.approx(measured, rel=1e-6)


def test_adapters_count_where_they_help(scores: ScoreFile) -> None:
    curve = tuple(replace(p, loss_with_adapters=p.loss + (0.01 if p.ratio > 0.5 else -0.01)) for p in scores.curve)
    helped = replace(scores, curve=curve)
    losses = component_losses(helped)
    cuts = measured_cuts(helped, losses)
    estimates = [sum(float(losses[n][u].sum()) for n, u in _cut(helped, p.ratio).items()) for p in helped.curve[1:]]
    assert [cuts.adapters(e) for e in estimates] == [False, False, True, True]
    assert estimates[-1] == pytest.approx(helped.curve[-1].loss - 0.01 - helped.curve[0].loss, rel=1e-6)


def test_noise_near_the_dense_model_makes_nothing_free(scores: ScoreFile) -> None:
    flat = replace(scores, curve=(scores.curve[0], CurvePoint(0.8, scores.curve[0].loss - 0.01), *scores.curve[2:]))
    losses = component_losses(flat)
    assert all((values > 0).all() for values in losses.values())
    # What the first step was given too much of, the next ones make up for.
    for point in flat.curve[2:]:
        estimate = sum(float(losses[name][units].sum()) for name, units in _cut(flat, point.ratio).items())
        assert estimate == pytest.approx(point.loss - flat.curve[0].loss, rel=1e-6)


def test_a_score_file_without_a_curve_keeps_its_estimates(scores: ScoreFile) -> None:
    bare = replace(scores, curve=scores.curve[:1])
    total = sum(float(m.drop_loss.sum()) for m in bare.modules.values())
    assert sum(float(v.sum()) for v in component_losses(bare).values()) == pytest.approx(total, rel=1e-5)
