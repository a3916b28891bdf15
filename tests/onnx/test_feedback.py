"""Error feedback in ONNX's types: the same scales and zero points, other codes, and the error that counts falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from acip_export.errors import UnsupportedError
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import WeightType, types_of
from converters.onnx.converter import round_trip
from converters.onnx.feedback import with_feedback
from converters.onnx.format import ONNX
from converters.onnx.quantize import dequantize, quantize
from tests.gguf.test_feedback import cost, matrix, moment, moments_of

EVERY = [form for form in types_of("onnx") if not form.is_float]
# Both kinds at every number of bits; other blocks and float16 scales are the same code.
QUANTIZED = [form for form in EVERY if form.block in (32, 128) and form.item_bytes == 4]
NAMES = [form.name for form in QUANTIZED]


def test_the_planner_knows_which_types() -> None:
    assert {form.name for form in EVERY} == ONNX.feedback_types


@pytest.mark.parametrize("form", QUANTIZED, ids=NAMES)
@pytest.mark.parametrize("columns", [256, 100])  # the second fills no block
def test_codes_change_and_nothing_else(form: WeightType, columns: int) -> None:
    weight, inputs = matrix(24, columns), moments_of(moment(columns, 8, 0))
    assert inputs.feedback is not None and inputs.importance is not None
    before = quantize(weight.numpy(), form, inputs.importance.numpy())
    after = with_feedback(before, weight.numpy(), form, inputs.feedback)
    assert after.codes.shape == before.codes.shape and after.codes.dtype == before.codes.dtype
    assert not np.array_equal(after.codes, before.codes)
    assert after.scales is before.scales and after.zeros is before.zeros
    # What fills up the last block stays nothing.
    padded = [dequantize(each, form, before.scales.shape[1] * form.block)[:, columns:] for each in (before, after)]
    np.testing.assert_array_equal(*padded)


@pytest.mark.parametrize("form", QUANTIZED, ids=NAMES)
def test_the_weighted_error_falls(form: WeightType) -> None:
    for seed, rank in enumerate((4, 32, 200)):
        second, weight = moment(256, rank, seed), matrix(48, seed=seed)
        inputs = moments_of(second)
        nearest = cost(weight, round_trip(weight, form.name, InputMoments(inputs.importance)), second)
        carried = cost(weight, round_trip(weight, form.name, inputs), second)
        assert carried < 0.8 * nearest


def test_a_factor_that_carries_nothing_chooses_the_nearest_codes() -> None:
    """Of the scales as they are stored: they were fitted to the codes once more after those had been chosen."""
    weight = matrix(24)
    silent = moments_of(torch.zeros(256, 256, dtype=torch.float64))
    for form in QUANTIZED:
        before, after = (
            (round_trip(weight, form.name, inputs) - weight).abs()
            for inputs in (InputMoments(silent.importance), silent)
        )
        assert bool((after <= before + 1e-6).all())


def test_a_factor_of_another_matrix_is_refused() -> None:
    inputs = moments_of(moment(64, 4, 0))
    with pytest.raises(UnsupportedError, match="error feedback for 64 inputs cannot round rows of 256 weights"):
        round_trip(matrix(8), "int4", InputMoments(None, inputs.feedback))
