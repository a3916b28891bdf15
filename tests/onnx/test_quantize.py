"""The block quantizer against the operators that read it, and against the size and error table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from acip_export.weight_types import WeightType, types_of, weight_type
from converters.onnx.quantize import Floats, Quantized, dequantize, quantize

QUANTIZED = [fmt for fmt in types_of("onnx") if not fmt.is_float]
NAMES = [fmt.name for fmt in QUANTIZED]


def gaussian(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def error(weight: Floats, fmt: WeightType, importance: Floats | None = None, judge: Floats | None = None) -> float:
    """Relative error with columns weighted by ``judge``."""
    back = dequantize(quantize(weight, fmt, importance), fmt, weight.shape[1])
    columns = np.ones(weight.shape[1], np.float32) if judge is None else judge
    return float((columns * (weight - back) ** 2).sum() / (columns * weight**2).sum())


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
@pytest.mark.parametrize("columns", [32, 96, 100, 256])
def test_stored_bytes_are_the_tables(fmt: WeightType, columns: int) -> None:
    quantized = quantize(gaussian(7, columns), fmt)
    stored = [part for part in (quantized.codes, quantized.scales, quantized.zeros) if part is not None]
    assert sum(part.nbytes for part in stored) == fmt.nbytes(7, columns)
    assert (quantized.zeros is not None) == fmt.name.startswith("u")


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_gaussian_error_is_the_tables(fmt: WeightType) -> None:
    # 2^18 weights: the figure itself is known to about half a percent; the table has two digits.
    assert error(gaussian(128, 2048), fmt) == pytest.approx(fmt.relative_mse, rel=0.03)


def rounded_plainly(weight: Floats, fmt: WeightType) -> Floats:
    """The block's largest weight at the last code, or its range over all codes: no search, no importance."""
    blocks = weight.reshape(len(weight), -1, fmt.block)
    last = 2**fmt.code_bits - 1
    if fmt.zero_point_bits:
        low, high = np.minimum(blocks.min(axis=2, keepdims=True), 0), np.maximum(blocks.max(axis=2, keepdims=True), 0)
        scale = (high - low) / last
        zero = np.rint(-low / scale)
    else:
        scale, zero = np.abs(blocks).max(axis=2, keepdims=True) / (last // 2), last // 2 + 1
    plain = np.clip(np.rint(blocks / scale) + zero, 0, last) - zero
    return (plain * scale).reshape(weight.shape)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_better_than_plain_rounding(fmt: WeightType) -> None:
    weight = gaussian(64, 512)
    plain = float(((weight - rounded_plainly(weight, fmt)) ** 2).sum() / (weight**2).sum())
    # Eight bits have so many codes that where the ends fall hardly matters; the fitted scale gains a little.
    assert error(weight, fmt) < (0.999 if fmt.code_bits == 8 else 0.95) * plain


@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_pay_where_weights_lie_to_one_side(bits: int) -> None:
    weight = gaussian(64, 512) + np.float32(1.5)
    symmetric, asymmetric = (error(weight, weight_type("onnx", f"{kind}{bits}")) for kind in ("int", "uint"))
    assert asymmetric < (0.5 if bits == 4 else 0.9) * symmetric


@pytest.mark.parametrize("name", ["int4", "int2", "uint4", "uint2-b64"])
def test_importance_moves_the_error_to_columns_that_matter_less(name: str) -> None:
    fmt, weight = weight_type("onnx", name), gaussian(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100.0, 1.0).astype(np.float32)
    assert error(weight, fmt, importance, importance) < 0.9 * error(weight, fmt, None, importance)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=NAMES)
def test_extreme_rows_stay_finite(fmt: WeightType) -> None:
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
@pytest.mark.parametrize("columns", [64, 100, 768])
def test_matmul_operator_reads_what_we_dequantize(fmt: WeightType, columns: int) -> None:
    half = fmt.item_bytes == 2
    weight, x = gaussian(24, columns), gaussian(5, columns, seed=1).astype(np.float16 if half else np.float32)
    weight[::3] += 1.0  # or zero points would all be in the middle
    quantized = quantize(weight, fmt)
    attributes = {"K": columns, "N": 24, "bits": fmt.code_bits, "block_size": fmt.block}
    exact = x.astype(np.float32) @ dequantize(quantized, fmt, columns).T
    y = run("MatMulNBits", ["x", "codes"], x, quantized, accuracy_level=0, **attributes)
    # Sums of up to 768 products in float32; or the result, of up to 100, in float16's eleven bits.
    np.testing.assert_allclose(y, exact, rtol=2e-3 if half else 1e-5, atol=1e-1 if half else 1e-4)
    # Level 4 rounds every block of activations to 127 levels of its largest: 4/127/sqrt(12) of noise on a unit normal,
    # so half a per cent to one of the result's size; twice that is allowed. A zero point off by one would be 10 %.
    y = run("MatMulNBits", ["x", "codes"], x, quantized, accuracy_level=4, **attributes)
    assert np.abs(y - exact).std() < 0.02 * exact.std()


GATHERED = [fmt for fmt in QUANTIZED if fmt.code_bits != 2]


@pytest.mark.parametrize("fmt", GATHERED, ids=[fmt.name for fmt in GATHERED])
@pytest.mark.parametrize("columns", [256, 768])
def test_gather_operator_reads_what_we_dequantize(fmt: WeightType, columns: int) -> None:
    quantized = quantize(gaussian(24, columns) + np.float32(0.5), fmt)
    ids = np.array([[3, 0, 23]], np.int64)
    stored = replace(quantized, codes=quantized.codes.reshape(24, -1))
    attributes = {"bits": fmt.code_bits, "block_size": fmt.block, "gather_axis": 0, "quantize_axis": 1}
    y = run("GatherBlockQuantized", ["codes", "x"], ids, stored, **attributes)
    # One rounding of the product: 24 bits, or 11.
    np.testing.assert_allclose(y, dequantize(quantized, fmt, columns)[ids], rtol=5e-4 if fmt.item_bytes == 2 else 1e-6)


def run(op: str, inputs: list[str], x: np.ndarray, stored: Quantized, **attributes: int) -> Floats:
    """One operator of onnxruntime."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    parts = {"codes": stored.codes, "scales": stored.scales}
    if stored.zeros is not None:
        parts["zeros"] = stored.zeros
    graph = helper.make_graph(
        [helper.make_node(op, [*inputs, *list(parts)[1:]], ["y"], domain="com.microsoft", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(stored.scales.dtype), None)],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result: Floats = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return result
