"""Packed second moments: what they lose, what they keep exactly, and numbers that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from acip_export.errors import ScoreFileError
from acip_export.lowrank import moments
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.moments import PackedMoment, lifted, pack_gradients, pack_moment
from acip_export.lowrank.whitening import Whitening
from acip_export.rounding.error_feedback import Grid, round_with_feedback


def moment_of(size: int, seed: int = 0, tokens: int = 2000) -> Tensor:
    """Correlated inputs of very different sizes, one of them ten times the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, size, generator=generator).double()
    mixed += (
        2 * torch.randn(tokens, 6, generator=generator).double() @ torch.randn(6, size, generator=generator).double()
    )
    mixed *= torch.logspace(0, -1, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    mixed[:, 3] *= 10
    return mixed.T @ mixed / tokens


def test_a_moment_in_six_bits_an_entry() -> None:
    moment = moment_of(192)
    packed = pack_moment(moment.triu())  # the lower triangle is not looked at
    found = packed.unpacked()
    assert 8 * packed.codes.nbytes < 6.6 * 192 * 191 / 2
    assert torch.equal(found.diagonal(), moment.diagonal().float().double())
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    scale = moment.diagonal().rsqrt()
    assert float(((found - moment) * scale * scale[:, None]).abs().max()) < 0.05
    assert np.array_equal(pack_moment(moment).codes, packed.codes)  # equal moments give equal files


def test_changes_of_a_weight_cost_what_they_cost() -> None:
    """Also those that the moment itself makes cheap: the pairs of every rank."""
    inputs, gradients = moment_of(96), moment_of(80, seed=1)
    weight = torch.randn(80, 96, generator=torch.Generator().manual_seed(2))
    packed = pack_moment(inputs).unpacked(), pack_gradients(gradients, weight).unpacked()
    exact, rough = (
        whitened_components(weight, Whitening.of(h), Whitening.of(g)) for h, g in ((inputs, gradients), packed)
    )
    for rank in (16, 40, 64):
        costs = []
        for basis in (exact, rough):
            change = (basis.up[:, rank:] @ basis.down[rank:]).double()
            costs.append(float(((gradients @ change) * (change @ inputs)).sum()))
        assert costs[1] < 1.02 * costs[0]


def test_gradients_of_many_outputs_keep_what_meets_the_columns_of_the_weight() -> None:
    gradients = moment_of(160)
    weight = torch.randn(160, 48, generator=torch.Generator().manual_seed(2)).double()
    weight[:, 7] = weight[:, 5] + weight[:, 6]  # dependent columns
    weight[:, 9] = 0
    packed = pack_gradients(gradients, weight)
    assert packed.size == 48
    diagonal = gradients.diagonal().float().numpy()
    found = lifted(packed.unpacked(), diagonal, weight)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    for change in (
        torch.eye(48).double()[:, :5],
        torch.randn(48, 5, generator=torch.Generator().manual_seed(3)).double(),
    ):
        columns = weight @ change
        measured, expected = ((columns.T @ g @ columns).diagonal() for g in (found, gradients))
        torch.testing.assert_close(measured, expected, rtol=0.02, atol=0)
    # Channels that are scaled before rounding: what is kept serves them too.
    rows, columns = torch.rand(160).double() + 0.5, torch.rand(48).double() + 0.5
    scaled = lifted(
        packed.unpacked(), (torch.from_numpy(diagonal) * rows**2).float().numpy(), weight * columns / rows[:, None]
    )
    torch.testing.assert_close(scaled, found * rows * rows[:, None], rtol=1e-3, atol=1e-5 * float(found.max()))


def test_scaled_inputs() -> None:
    moment, scales = moment_of(64), torch.rand(64) + 0.5
    packed = pack_moment(moment)
    wide = scales.double()
    torch.testing.assert_close(
        packed.scaled(scales.numpy()).unpacked(), packed.unpacked() * wide * wide[:, None], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("tokens", [None, 2200])
@pytest.mark.parametrize(("scaled", "wide"), [(False, False), (True, False), (True, True)])
def test_the_factor_of_error_feedback_is_that_of_the_damped_moment(
    scaled: bool, wide: bool, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is found without the moment, in float32, over several blocks; few tokens count for less."""
    size = 1100
    if wide:
        monkeypatch.setattr(moments, "SORTED_COLUMNS", size - 1)
    packed = replace(pack_moment(moment_of(size)), tokens=tokens)
    if scaled:
        for seed in range(2):  # one after the other, as adapters and channels may scale
            packed = packed.scaled(torch.rand(size, generator=torch.Generator().manual_seed(seed)).add(0.5).numpy())
    factor = packed.feedback_factor()
    factor.check("it")
    order = torch.from_numpy(factor.order).long()
    assert (np.diff(packed.diagonal[factor.order]) <= 0).all() != wide
    moment = packed.unpacked()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(size)
    if tokens is not None:  # half of them
        damped += 0.5 * torch.diag(moment.diagonal())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    expected = (upper / upper.diagonal()[:, None]).triu(1)
    found = torch.from_numpy(factor.rows(0, size)).double()
    # Half a step of the eight bits, and that what is unpacked gets its diagonal back, exactly.
    off = (found - expected).abs().amax(1)
    assert bool((off <= 0.5 * torch.from_numpy(factor.steps) + 0.05 * expected.abs().amax(1)).all())


def test_moments_of_few_tokens_round_other_text_better_when_they_count_for_less() -> None:
    """Weighted errors under the moment of a thousand times the text, with error feedback of few tokens."""
    size, tokens = 256, 512
    truth = moment_of(size, tokens=200_000)
    lower = torch.linalg.cholesky(truth)
    draws = torch.randn(tokens, size, generator=torch.Generator().manual_seed(5)).double() @ lower.T
    packed = pack_moment(draws.T @ draws / tokens)
    weight = torch.randn(64, size, generator=torch.Generator().manual_seed(6)).numpy() * np.float32(4)
    grid = Grid(np.ones((64, 1), np.float32), size, -20, 20)

    def cost(counted: int | None) -> float:
        change = round_with_feedback(weight, grid, replace(packed, tokens=counted).feedback_factor()) - weight
        wide = torch.from_numpy(change).double()
        return float(((wide @ truth) * wide).sum())

    assert cost(tokens) < 0.95 * cost(None)


def test_factors_of_inputs_that_were_scaled_beyond_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, few = pack_moment(moment_of(64)), pack_moment(moment_of(700, tokens=300))
    # Vanishing inputs leave nothing to make up for.
    assert not replace(packed, tokens=8).scaled(np.full(64, 1e-30, np.float32)).feedback_factor().codes.any()
    assert not packed.scaled(np.full(64, 1e-30, np.float32)).feedback_factor().codes.any()
    infinite = packed.scaled(np.full(64, np.inf, np.float32))
    with pytest.raises(ScoreFileError, match="'x' overflows; rank again"):
        infinite.feedback_factor("'x'")
    monkeypatch.setattr(moments, "SORTED_COLUMNS", 0)
    with pytest.raises(ScoreFileError, match="'x' overflows; rank again"):
        infinite.feedback_factor("'x'")
    # Four decades: float32 does not, float64 does.
    apart = 10 ** (4 * np.random.default_rng(0).random(700) - 2)
    few.scaled(apart.astype(np.float32)).feedback_factor().check("it")


def test_the_factor_of_inputs_scaled_by_three_decades_is_as_good_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = 10 ** (3 * np.random.default_rng(1).random(700) - 2)
    packed = pack_moment(moment_of(700, tokens=300)).scaled(apart.astype(np.float32))
    found = packed.feedback_factor()
    widened = moments.PackedMoment._upper
    monkeypatch.setattr(moments.PackedMoment, "_upper", lambda self, name, _dtype: widened(self, name, torch.float64))
    exact = packed.feedback_factor()
    assert np.array_equal(found.order, exact.order) and np.array_equal(found.codes, exact.codes)


@pytest.mark.parametrize("tokens", [300, 2000])
def test_the_factor_of_inputs_of_very_different_size_is_as_good_as_in_float64(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that are a hundred times the others, squared, in a few channels: they are in float32."""
    apart = np.ones(700, np.float32)
    apart[[3, 90, 400]] = (10.0, 50.0, 100.0)
    wide = torch.from_numpy(apart).double()
    packed = replace(pack_moment(moment_of(700, tokens) * wide * wide[:, None]), tokens=tokens)
    found = packed.feedback_factor()
    asked: list[torch.dtype] = []
    widened = moments.PackedMoment._upper

    def in_float64(self: PackedMoment, name: str, dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return widened(self, name, torch.float64)

    monkeypatch.setattr(moments.PackedMoment, "_upper", in_float64)
    exact = packed.feedback_factor()
    assert asked == [torch.float32] and np.array_equal(found.order, exact.order)
    # One of the eight bits' steps at most.
    assert np.abs(found.codes.astype(np.int16) - exact.codes).max() <= 1


def test_a_part_of_a_moment() -> None:
    columns = torch.tensor([3, 50, 17])
    packed = pack_moment(moment_of(64)).scaled(np.linspace(1, 2, 64, dtype=np.float32))
    whole = packed.unpacked()
    torch.testing.assert_close(packed.unpacked(part=columns), whole[columns][:, columns])
    weight = torch.randn(160, 64, generator=torch.Generator().manual_seed(2)).double()
    diagonal, rows = np.linspace(1, 3, 160, dtype=np.float32), torch.arange(0, 160, 7)
    torch.testing.assert_close(
        lifted(whole, diagonal, weight, rows), lifted(whole, diagonal, weight)[rows][:, rows], rtol=1e-9, atol=1e-9
    )


def test_what_was_never_seen() -> None:
    moment = moment_of(32)
    moment[5] = moment[:, 5] = 0
    found = pack_moment(moment).unpacked()
    assert not found[5].any() and float(found[6, 6]) > 0
    assert not pack_moment(torch.zeros(4, 4)).unpacked().any()
    assert float(pack_moment(torch.ones(1, 1)).unpacked()) == 1


def test_moments_of_few_tokens_and_those_that_are_none() -> None:
    few = moment_of(64, tokens=10).float()
    assert float(torch.linalg.eigvalsh(pack_moment(few).unpacked())[0]) > 0
    slightly = torch.eye(64) * 1.0
    slightly[0, 1] = slightly[1, 0] = 1.01  # an eigenvalue of -0.01
    assert float(torch.linalg.eigvalsh(pack_moment(slightly).unpacked())[0]) > 0
    with pytest.raises(ScoreFileError, match="x is none: it is not positive, even damped"):
        pack_moment(torch.ones(8, 8) * 100 - 99.5 * torch.eye(8), "x")
    with pytest.raises(ScoreFileError, match="x holds NaN"):
        pack_moment(torch.full((4, 4), torch.nan), "x")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("diagonal", -1.0, "a diagonal that is negative"),
        ("pivots", 0.0, "pivots that are not positive"),
        ("pivots", -1.0, "pivots that are not positive"),
        ("pivots", np.inf, "pivots that are not positive"),
        ("steps", -1.0, "steps that are negative"),
        ("steps", np.nan, "steps that are negative or not finite"),
    ],
)
def test_hostile_rows(part: str, value: float, message: str) -> None:
    packed = pack_moment(moment_of(8))
    array = getattr(packed, part).copy()
    array[2] = value
    with pytest.raises(ScoreFileError, match=f"x has {message}"):
        replace(packed, **{part: array}).check("x")


@pytest.mark.parametrize("harm", ["truncated", "more", "less", "followed", "no stream"])
def test_hostile_codes(harm: str) -> None:
    packed, other = pack_moment(moment_of(24)), {"more": 25, "less": 23}
    codes = {
        "truncated": packed.codes[:-3],
        "followed": np.append(packed.codes, np.uint8(0)),
        "no stream": np.zeros(20, np.uint8),
    }.get(harm)
    if codes is None:
        codes = pack_moment(moment_of(other[harm])).codes
    with pytest.raises(ScoreFileError, match="x has"):
        replace(packed, codes=codes).check("x")
    huge = replace(packed, steps=np.full(24, np.finfo(np.float32).max, np.float32))
    huge.check("x")
    with pytest.raises(ScoreFileError, match="x overflows"):
        huge.unpacked("x")
    assert isinstance(PackedMoment.of(packed.rows, packed.codes), PackedMoment)


@pytest.mark.parametrize("dependent", [False, True])
def test_every_kind_of_root_gives_the_same_components(dependent: bool) -> None:
    """Roots that come with packed moments, of inputs and of many outputs, and those of the moments themselves."""
    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(3)).double()
    if dependent:
        weight[:, 7], weight[:, 9] = weight[:, 5] + weight[:, 6], 0
    inputs, gradients = pack_moment(moment_of(40)), pack_gradients(moment_of(96, seed=1), weight)
    diagonal = moment_of(96, seed=1).diagonal().float().numpy()
    right, left = Whitening.packed(inputs), Whitening.lifted(Whitening.packed(gradients), diagonal, weight)
    found = whitened_components(weight, right, left)
    roots = (torch.linalg.cholesky(moment) for moment in (left.moment, right.moment))
    expected = torch.linalg.svdvals(next(roots).T @ weight @ next(roots))
    torch.testing.assert_close(found.up @ found.down, weight, rtol=1e-7, atol=1e-7)
    # A moment that is factorized whole is damped first.
    torch.testing.assert_close(found.singular[:36], expected[:36], rtol=1e-2 if dependent else 1e-5, atol=0)
    energy = left.of_columns(found.up).square().sum(0)
    torch.testing.assert_close(energy[:36], found.singular[:36], rtol=1e-6, atol=0)
    for matrix in (weight, found.up):
        torch.testing.assert_close(left.undone_columns(left.of_columns(matrix)), matrix, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            right.undone_rows(right.of_rows(matrix.T[:, :40])), matrix.T[:, :40], rtol=1e-7, atol=1e-7
        )


def test_outputs_without_gradients_have_a_root() -> None:
    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(3)).double()
    moment = moment_of(96, seed=1)
    moment[4] = moment[:, 4] = 0
    left = Whitening.lifted(Whitening.packed(pack_gradients(moment, weight)), moment.diagonal().float().numpy(), weight)
    found = whitened_components(weight, None, left)
    torch.testing.assert_close(found.up @ found.down, weight, rtol=1e-6, atol=1e-6)
