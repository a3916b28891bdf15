"""The numbers of the export: which tensors become which initializers, and their bytes, read and rounded in chunks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from acip_export.artifacts.materialized import stored_tensors
from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.rounding.error_feedback import rows_at_once
from acip_export.rounding.side_by_side import is_large, side_by_side
from acip_export.units import ceil_div
from acip_export.weight_types import WeightType, weight_type
from converters.onnx.feedback import with_feedback
from converters.onnx.quantize import Quantized, dequantize, joined, quantize, scale_type

if TYPE_CHECKING:
    from torch import Tensor

    from acip_export.artifacts.materialized import MaterializedModel
    from acip_export.rounding.error_feedback import FeedbackFactor
    from acip_export.rounding.kept_roundings import Arrays
    from acip_export.rounding.quantizer import InputMoments

# Weights that a thread converts at once: large enough for vectorised work, small enough to stay in a core's cache.
_CHUNK = 1 << 17

Form = Literal["rows", "columns", "codes", "flat_codes", "scales", "zeros"]
_CODES: tuple[Form, ...] = ("codes", "flat_codes")

# Initializer names of what lies beside a decoder's codes.
BESIDE: dict[Form, str] = {"scales": "scales", "zeros": "qzeros"}


@dataclass(frozen=True)
class Matrix:
    """One stored weight matrix.

    Attributes:
        tensor: its name. rows, columns: (out, in). format: how its numbers are stored.
    """

    tensor: str
    rows: int
    columns: int
    type: WeightType

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    @property
    def bits(self) -> int:
        return self.type.code_bits

    @property
    def blocks(self) -> int:
        return ceil_div(self.columns, self.type.block)

    @property
    def block_code_bytes(self) -> int:
        return self.type.block * self.bits // 8

    @property
    def beside(self) -> tuple[Form, ...]:
        """What a quantized matrix consists of besides its codes, in the order of the operators' inputs."""
        return ("scales", "zeros") if self.type.zero_point_bits else ("scales",)


@dataclass(frozen=True)
class MatrixPart:
    """What an initializer holds of a matrix.

    Attributes:
        form: ``rows``: floats as stored (out, in). ``columns``: floats transposed (in, out). ``codes``: uint8
            (out, blocks, block * bits / 8). ``flat_codes``: the same bytes as (out, blocks * block * bits / 8).
            ``scales``: floats (out, blocks). ``zeros``: zero points, uint8 (out, ceil(blocks * bits / 8)). Floats are
            float32 or float16, as the format has it.
    """

    matrix: Matrix
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        matrix = self.matrix
        match self.form:
            case "rows":
                return matrix.rows, matrix.columns
            case "columns":
                return matrix.columns, matrix.rows
            case "codes":
                return matrix.rows, matrix.blocks, matrix.block_code_bytes
            case "flat_codes":
                return matrix.rows, matrix.blocks * matrix.block_code_bytes
            case "scales":
                return matrix.rows, matrix.blocks
            case "zeros":
                return matrix.rows, ceil_div(matrix.blocks * matrix.bits, 8)

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.float32] | np.dtype[np.float16]:
        codes = self.form in (*_CODES, "zeros")
        return np.dtype(np.uint8) if codes else scale_type(self.matrix.type)


@dataclass(frozen=True)
class Vector:
    """A float32 initializer that holds a stored tensor as it is."""

    tensor: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)


def matrices_of(decision: TensorDecision) -> tuple[tuple[str, Matrix], ...]:
    """The chain of a decision.

    Raises:
        UnsupportedError: an adapter over a base, which this format does not have, or an unknown type.
    """
    if decision.representation in ("lora", "residual"):
        raise UnsupportedError(f"{decision.name}: ONNX exports have no adapters; plan with  --layout factored")
    if decision.representation == "dense":
        return (("", _matrix(decision.name, decision.shape, decision.type)),)
    up, down = stored_tensors(decision.name, decision.shape, decision.rank).items()
    return ("down", _matrix(*down, decision.down_type)), ("up", _matrix(*up, decision.up_type))


def _matrix(tensor: str, shape: tuple[int, ...], name: str | None) -> Matrix:
    try:
        fmt = weight_type("onnx", name or "")
    except KeyError:
        raise UnsupportedError(
            f"{tensor}: ONNX has no weight format {name!r}; plan again with  --format onnx"
        ) from None
    return Matrix(tensor, shape[0], shape[1], fmt)


class ChunkReader(Protocol):
    """Gives the numbers of initializers."""

    def chunks(self, part: MatrixPart | Vector) -> Iterator[NDArray[np.generic]]:
        """Yield contiguous arrays that together are the initializer's bytes."""
        ...


class NoiseReader:
    """Gives random codes, and small numbers for everything else: what takes as long to compute as a model's own.

    No two matrices are alike: onnxruntime packs equal ones once, which takes less memory and less time to read.
    """

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def chunks(self, part: MatrixPart | Vector) -> Iterator[NDArray[np.generic]]:
        """See :class:`ChunkReader`."""
        if part.dtype == np.uint8:
            yield self._random.integers(0, 256, part.shape, np.uint8)
        elif isinstance(part, Vector):
            yield np.ones(part.shape, part.dtype)
        else:
            yield (1e-3 * (0.5 + self._random.random(part.shape, np.float32))).astype(part.dtype)


class MatrixReader:
    """Reads stored matrices as the chunks of bytes that the data file is made of.

    The scales and zero points of a quantized matrix are found with its codes and kept until they are asked for, which
    the order of the initializers makes the next questions. A context manager: codes are found ahead by threads, which
    end with it.

    Args:
        parts: that will be asked for, in their order.
    """

    def __init__(self, model: MaterializedModel, parts: Iterable[object]) -> None:
        self._model = model
        self._kept: dict[MatrixPart, NDArray[np.generic]] = {}
        codes = [part for part in parts if isinstance(part, MatrixPart) and part.form in _CODES]
        self._rounded = side_by_side(self._prepared, codes, lambda part: part.matrix.numbers)

    def chunks(self, part: MatrixPart | Vector) -> Iterator[NDArray[np.generic]]:
        """See :class:`ChunkReader`."""
        if isinstance(part, Vector):
            yield _floats(self._model.read(part.tensor))
            return
        if part.form in ("scales", "zeros"):
            yield self._kept.pop(part)
        elif part.form in _CODES:
            due, rounded = next(self._rounded)
            assert due == part, f"{part.matrix.tensor} is asked for before {due.matrix.tensor}"
            yield from self._codes(rounded, part.matrix)
        elif part.form == "rows":
            for rows in _slices(self._model.read(part.matrix.tensor), part.matrix.columns):
                yield _floats(rows).astype(part.dtype, copy=False)
        else:
            for columns in _slices(self._model.read(part.matrix.tensor).T, part.matrix.rows):
                yield _floats(columns).astype(part.dtype, copy=False)

    def _prepared(self, part: MatrixPart) -> Callable[[], Iterable[Quantized]]:
        """Read a matrix and what is known of its inputs; what is returned rounds it, a large one as it is read."""
        matrix = part.matrix
        weight, inputs = self._model.read(matrix.tensor), self._model.inputs(matrix.tensor)
        round_ = partial(_quantized, weight, matrix.type, inputs)
        return round_ if is_large(matrix.numbers) else lambda: list(round_())

    def _codes(self, rounded: Iterable[Quantized], matrix: Matrix) -> Iterator[NDArray[np.generic]]:
        beside: dict[Form, list[NDArray[np.generic]]] = {form: [] for form in matrix.beside}
        for quantized in rounded:
            beside["scales"].append(quantized.scales)
            if quantized.zeros is not None:
                beside["zeros"].append(quantized.zeros)
            yield quantized.codes
        for form, parts in beside.items():
            self._kept[MatrixPart(matrix, form)] = np.concatenate(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rounded.close()


def rounded(weight: Tensor, form: WeightType, inputs: InputMoments) -> Tensor:
    """What the runtime reads of a matrix (rows, columns) stored in ``form``: float32."""
    import torch  # not at the top: plans are made without it

    if form.is_float:
        return weight.float() if form.item_bytes == 4 else weight.half().float()
    parts = [dequantize(quantized, form, weight.shape[1]) for quantized in _quantized(weight, form, inputs)]
    return torch.from_numpy(np.concatenate(parts))


def _quantized(weight: Tensor, form: WeightType, inputs: InputMoments) -> Iterator[Quantized]:
    """Yield rows of the quantized matrix, some at a time."""
    end = 0
    for quantized in _untuned(weight, form, inputs):
        start, end = end, end + len(quantized.scales)
        if inputs.gains is None:
            yield quantized
        else:
            scales = quantized.scales.astype(np.float32) * inputs.gains[start:end].float().numpy()
            yield replace(quantized, scales=scales.astype(quantized.scales.dtype))


def _untuned(weight: Tensor, form: WeightType, inputs: InputMoments) -> Iterator[Quantized]:
    importance, feedback, kept = inputs.importance, inputs.feedback, inputs.kept
    for some, rows in rows_at_once(weight, inputs.row_feedback):
        if feedback is None and kept is None:
            yield from _nearest(some, form, inputs)
            continue
        compute = partial(_joined, some, form, inputs, rows)
        arrays = compute() if kept is None else kept.arrays(some, form.name, importance, feedback, compute, rows)
        yield Quantized(*arrays)


def _nearest(weight: Tensor, form: WeightType, inputs: InputMoments) -> Iterator[Quantized]:
    importance = None if inputs.importance is None else _floats(inputs.importance)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        slices = _slices(weight, weight.shape[1])
        yield from pool.map(lambda rows: quantize(_floats(rows), form, importance), slices)


def _joined(weight: Tensor, form: WeightType, inputs: InputMoments, rows: FeedbackFactor | None) -> Arrays:
    found, feedback = joined(list(_nearest(weight, form, inputs))), inputs.feedback
    if feedback is not None:
        found = with_feedback(found, _floats(weight), form, feedback, rows)
    return found.arrays


def _slices(weight: Tensor, width: int) -> Iterator[Tensor]:
    step = max(1, _CHUNK // width)
    return (weight[start : start + step] for start in range(0, len(weight), step))


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array
