"""Error feedback in ggml's types: the bytes are what ggml reads, and the error that counts falls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from acip_export import machine
from acip_export.errors import ScoreFileError, UnsupportedError
from acip_export.lowrank.moments import pack_moment
from acip_export.rounding import error_feedback
from acip_export.rounding.error_feedback import FeedbackFactor
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import weight_type
from converters.gguf import ggml_library as ggml
from converters.gguf.block_codes import BLOCK_CODES, blocks_of
from converters.gguf.rounding import quantize, round_trip
from converters.gguf.types import FEEDBACK_TYPES

COLUMNS = 256
# ggml's compilers may fuse the product and the sum of a scale and a minimum: the last bit of a weight.
WITH_MINIMA = {"q5_k", "q5_1", "q4_k", "q4_1", "q2_k"}


def moment(columns: int, rank: int, seed: int) -> torch.Tensor:
    """A second moment with ``rank`` strong directions, and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(2000, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    samples = (strong + torch.randn(2000, columns, generator=generator)).double()
    samples *= torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return samples.T @ samples / len(samples)


def matrix(rows: int, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments_of(second: torch.Tensor) -> InputMoments:
    return InputMoments(second.diagonal().float(), pack_moment(second).feedback_factor())


def cost(weight: torch.Tensor, rounded: torch.Tensor, second: torch.Tensor) -> float:
    change = (rounded - weight).double()
    return float(((change @ second) * change).sum())


def test_the_planner_knows_which_types() -> None:
    assert BLOCK_CODES.keys() == FEEDBACK_TYPES


@pytest.mark.parametrize("name", sorted(BLOCK_CODES))
def test_codes_are_where_ggml_reads_them(name: str) -> None:
    """Every code in every place: what ggml dequantizes is what the grid says."""
    rows, known = 64, BLOCK_CODES[name]
    blocks = blocks_of(ggml.quantize(matrix(rows), name), name)
    codes = np.random.default_rng(0).integers(known.lowest, known.highest + 1, (rows, COLUMNS)).astype(np.int8)
    known.put(blocks, codes)
    read = ggml.dequantize(blocks.reshape(-1), (rows, COLUMNS), name)
    grid = known.grid(blocks, rows)
    steps = np.repeat(grid.steps, known.group, axis=1)
    values = codes.astype(np.float32) if known.levels is None else known.levels[codes]
    expected = steps * values
    if grid.offsets is not None:
        expected += np.repeat(grid.offsets, known.group, axis=1)
    if name in WITH_MINIMA:
        np.testing.assert_allclose(read, expected, rtol=0, atol=2e-7 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("name", sorted(BLOCK_CODES))
def test_the_weighted_error_falls(name: str) -> None:
    for seed, rank in enumerate((4, 32, 200)):
        second, weight = moment(COLUMNS, rank, seed), matrix(48, seed=seed)
        inputs = moments_of(second)
        nearest = cost(weight, round_trip(weight, name, InputMoments(inputs.importance)), second)
        carried = cost(weight, round_trip(weight, name, inputs), second)
        assert carried < 0.75 * nearest


@pytest.mark.parametrize("name", sorted(BLOCK_CODES))
def test_scales_and_sizes_are_those_of_ggml(name: str) -> None:
    weight, inputs = matrix(16), moments_of(moment(COLUMNS, 16, 0))
    nearest, carried = quantize(weight, name, InputMoments(inputs.importance)), quantize(weight, name, inputs)
    assert carried.nbytes == weight_type("gguf", name).nbytes(16, COLUMNS) == nearest.nbytes
    assert not np.array_equal(carried, nearest)
    for ours, theirs in zip(*(BLOCK_CODES[name].scales(blocks_of(d, name)) for d in (carried, nearest)), strict=True):
        assert ours is theirs is None or np.array_equal(ours, theirs)  # type: ignore[arg-type]


def test_without_a_factor_nothing_changes() -> None:
    weight, importance = matrix(8), torch.rand(COLUMNS)
    for inputs in (None, InputMoments(), InputMoments(importance)):
        expected = ggml.quantize(weight, "q4_0", None if inputs is None else inputs.importance)
        assert np.array_equal(quantize(weight, "q4_0", inputs), expected)
    # Inputs that know nothing about each other: no column can make up for another.
    inputs = moments_of(torch.diag(importance.double()))
    assert np.array_equal(quantize(weight, "q5_0", inputs), _nearest(weight, "q5_0", importance))
    # A type whose codes are not chosen here.
    wide = InputMoments(importance, moments_of(moment(COLUMNS, 8, 0)).feedback)
    assert np.array_equal(quantize(weight, "iq3_xxs", wide), ggml.quantize(weight, "iq3_xxs", importance))


def _nearest(weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> ggml.Bytes:
    """The nearest code under the scale as it is stored; ggml's own codes are of the scale before it was rounded."""
    data, known = ggml.quantize(weight, name, importance), BLOCK_CODES[name]
    blocks = blocks_of(data, name)
    steps = np.repeat(known.scales(blocks)[0].reshape(len(weight), -1), known.group, axis=1)
    codes = np.rint(weight.numpy() * (1 / steps)).clip(known.lowest, known.highest)
    known.put(blocks, codes.astype(np.int8))
    return data


def test_ggmls_threads_and_rows_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = matrix(1100, 320), moments_of(moment(320, 32, 1))  # three parts of rows
    monkeypatch.setattr(machine, "processors", lambda: 1)
    alone = quantize(weight, "q4_0", inputs)
    monkeypatch.setattr(machine, "processors", lambda: 3)
    assert np.array_equal(quantize(weight, "q4_0", inputs), alone)
    monkeypatch.setattr(error_feedback, "ROWS_AT_ONCE", 512)
    assert np.array_equal(quantize(weight, "q4_0", inputs), alone)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_without_ggmls_library_the_bytes_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = matrix(16), moments_of(moment(COLUMNS, 16, 2))
    native = quantize(weight, name, inputs)
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    assert np.array_equal(quantize(weight, name, inputs), native)


def test_eight_bits_of_the_factor_lose_nothing() -> None:
    """Against the same algorithm, written down plainly, in float64."""
    second, weight = moment(128, 24, 3), matrix(40, 128)
    inputs = moments_of(second)
    data = ggml.quantize(weight, "q4_0", inputs.importance)
    steps = np.repeat(BLOCK_CODES["q4_0"].scales(blocks_of(data, "q4_0"))[0].reshape(40, 4), 32, axis=1)
    order = torch.argsort(second.diagonal(), descending=True, stable=True)
    damped = second[order][:, order] + 0.01 * second.diagonal().mean() * torch.eye(128)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    work, scales, plain = weight.double()[:, order], torch.from_numpy(steps).double()[:, order], torch.zeros(40, 128)
    for column in range(128):
        code = (work[:, column] / scales[:, column]).round().clamp(-8, 7).nan_to_num()
        plain[:, order[column]] = (code * scales[:, column]).float()
        error = (work[:, column] - code * scales[:, column]) / upper[column, column]
        work[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    ours = cost(weight, round_trip(weight, "q4_0", inputs), second)
    assert ours == pytest.approx(cost(weight, plain, second), rel=0.05)


def test_singular_moments_are_damped() -> None:
    few = torch.randn(5, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    second = few.T @ few / 5
    second[:, :40] = second[:40] = 0  # columns that were never excited
    weight, inputs = matrix(16), moments_of(second)
    back = round_trip(weight, "q4_0", inputs)
    assert torch.isfinite(back).all()
    nearest = round_trip(weight, "q4_0", InputMoments(inputs.importance))
    assert cost(weight, back, second) < 0.1 * cost(weight, nearest, second)
    nothing = moments_of(torch.zeros(COLUMNS, COLUMNS))
    assert np.array_equal(quantize(weight, "q5_0", nothing), _nearest(weight, "q5_0", nothing.importance))


def test_moments_that_are_none_are_refused() -> None:
    second = moment(COLUMNS, 8, 0)
    second[3, 4] = second[4, 3] = torch.nan
    with pytest.raises(ScoreFileError, match="'layer' holds NaN or infinity; rank again"):
        pack_moment(second, "'layer'")
    with pytest.raises(ScoreFileError, match="'layer' is none: it is not positive, even damped"):
        pack_moment(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), "'layer'")
    with pytest.raises(UnsupportedError, match="256 inputs cannot round rows of 128 weights"):
        quantize(matrix(4, 128), "q4_0", InputMoments(None, moments_of(moment(COLUMNS, 8, 0)).feedback))


def test_a_factor_checks_itself() -> None:
    factor = pack_moment(moment(64, 8, 0)).feedback_factor()
    factor.check("m")
    rows = factor.rows(0, 64)
    assert not np.tril(rows).any() and np.abs(rows).max() > 0
    assert all(np.array_equal(factor.rows(a, b), rows[a:b]) for a, b in pairwise((0, 10, 50, 64)))
    for damaged, message in (
        (FeedbackFactor(factor.order, factor.codes[1:], factor.steps), "2015 codes"),
        (FeedbackFactor(np.zeros_like(factor.order), factor.codes, factor.steps), "every place once"),
        (FeedbackFactor(factor.order, factor.codes, np.full_like(factor.steps, np.inf)), "not finite"),
        (FeedbackFactor(factor.order.astype(np.float32), factor.codes, factor.steps), "another kind"),  # type: ignore[arg-type]
        (FeedbackFactor(factor.order, factor.codes.astype(np.float32), factor.steps), "another kind"),  # type: ignore[arg-type]
        (FeedbackFactor(factor.order[0], factor.codes, factor.steps), "another kind"),
    ):
        with pytest.raises(ValueError, match=message):
            damaged.check("m")
