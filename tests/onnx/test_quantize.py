"""The block quantizer against the operators that read it, and against the size and error table."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from acip_export.formats import WeightFormat, formats_of, weight_format
from converters.onnx.quantize import Floats, bits_of, dequantize, quantize

QUANTIZED = [fmt for fmt in formats_of("onnx") if not fmt.is_float]
NAMES = [fmt.name for fmt in QUANTIZED]


def gaussian(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def error(weight: Floats, fmt: WeightFormat, importance: Floats | None = None, judge: Floats | None = None) -> float:
    """Relative error with columns weighted by ``judge``."""
    back = dequantize(quantize(weight, fmt, importance), fmt, weight.shape[1])
    columns = np.ones(weight.shape[1], np.float32) if judge is None else judge
    return float((columns * (weight - back) ** 2).sum() / (columns * weight**2).sum())


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
@pytest.mark.parametrize("columns", [32, 96, 100, 256])
def test_stored_bytes_are_the_tables(fmt: WeightFormat, columns: int) -> None:
    quantized = quantize(gaussian(7, columns), fmt)
    assert quantized.codes.nbytes + quantized.scales.nbytes == fmt.nbytes(7, columns)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_gaussian_error_is_the_tables(fmt: WeightFormat) -> None:
    # 2^18 weights: the figure itself is known to about half a percent; the table has two digits.
    assert error(gaussian(128, 2048), fmt) == pytest.approx(fmt.relative_mse, rel=0.03)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_better_than_the_largest_weight_at_the_last_code(fmt: WeightFormat) -> None:
    weight = gaussian(64, 512)
    blocks = weight.reshape(64, -1, fmt.block)
    highest = 2 ** (bits_of(fmt) - 1) - 1
    scale = np.abs(blocks).max(axis=2, keepdims=True) / highest
    plain = np.clip(np.rint(blocks / scale), -highest - 1, highest) * scale
    assert error(weight, fmt) < 0.95 * float(((blocks - plain) ** 2).sum() / (blocks**2).sum())


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_importance_moves_the_error_to_columns_that_matter_less(name: str) -> None:
    fmt, weight = weight_format("onnx", name), gaussian(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100.0, 1.0).astype(np.float32)
    assert error(weight, fmt, importance, importance) < 0.9 * error(weight, fmt, None, importance)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_extreme_rows_stay_finite(fmt: WeightFormat) -> None:
    weight = np.zeros((4, fmt.block), np.float32)
    weight[1] = 1e-42  # denormal: its reciprocal is infinite
    half = fmt.item_bytes == 2
    weight[2, 3] = 1e4 if half else 1e12
    weight[3] = -5.0
    back = dequantize(quantize(weight, fmt, np.zeros(fmt.block, np.float32)), fmt, fmt.block)
    assert np.isfinite(back).all()
    assert (back[:2] == 0).all()
    # One rounding of the scale: 24 bits, or 11.
    np.testing.assert_allclose(back[2:], weight[2:], rtol=5e-4 if half else 1e-6)
    weight[2, 3] = 1e12  # beyond float16: the nearest that it has
    assert np.isfinite(dequantize(quantize(weight, fmt), fmt, fmt.block)).all()


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
@pytest.mark.parametrize("columns", [64, 100])
def test_matmul_operator_reads_what_we_dequantize(fmt: WeightFormat, columns: int) -> None:
    half = fmt.item_bytes == 2
    weight, x = gaussian(24, columns), gaussian(5, columns, seed=1).astype(np.float16 if half else np.float32)
    quantized = quantize(weight, fmt)
    attributes = {"K": columns, "N": 24, "bits": bits_of(fmt), "block_size": fmt.block}
    y = run("MatMulNBits", ["x", "codes", "scales"], x, (quantized.codes, quantized.scales), **attributes)
    # Sums of 100 products in float32; or the result, of up to 40, in float16's eleven bits.
    exact = x.astype(np.float32) @ dequantize(quantized, fmt, columns).T
    np.testing.assert_allclose(y, exact, atol=3e-2 if half else 2e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-b128", "int8-b128", "int4-f16", "int8-b128-f16"])
def test_gather_operator_reads_what_we_dequantize(name: str) -> None:
    fmt = weight_format("onnx", name)
    quantized = quantize(gaussian(24, 256), fmt)
    ids = np.array([[3, 0, 23]], np.int64)
    stored = (quantized.codes.reshape(24, -1), quantized.scales)
    attributes = {"bits": bits_of(fmt), "block_size": fmt.block, "gather_axis": 0, "quantize_axis": 1}
    y = run("GatherBlockQuantized", ["codes", "x", "scales"], ids, stored, **attributes)
    np.testing.assert_allclose(y, dequantize(quantized, fmt, 256)[ids], rtol=5e-4 if fmt.item_bytes == 2 else 1e-6)


def run(op: str, inputs: list[str], x: np.ndarray, stored: tuple[np.ndarray, np.ndarray], **attributes: int) -> Floats:
    """One operator of onnxruntime."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    scales = helper.np_dtype_to_tensor_dtype(stored[1].dtype)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", scales, None)],
        [numpy_helper.from_array(array, name) for array, name in zip(stored, ("codes", "scales"), strict=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result: Floats = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return result
