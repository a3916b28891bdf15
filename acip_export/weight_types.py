"""How a matrix is stored: block sizes, bytes, constraints and expected rounding error of a type.

Every format has a table of its types (``converters/gguf/types.py``, ``converters/onnx/types.py``); planner, converters
and tests take sizes from these tables and nowhere else.

``relative_mse`` is E[(w - dequantize(quantize(w)))^2] / E[w^2] on Gaussian weights; ``benchmarks/format_errors.py``
measures it and a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from acip_export.installed import load_format
from acip_export.units import ceil_div


@dataclass(frozen=True)
class WeightType:
    """How the rows of a weight matrix are stored.

    Attributes:
        name: as written in plans and on the command line.
        format: the file format that it belongs to.
        block: weights of one row that share a block (1 for floats).
        block_bytes: bytes of one block, scales and zero points included.
        pads_rows: rows are padded to whole blocks (ONNX); otherwise a row that is no multiple is refused (ggml).
        needs_importance: the quantizer refuses to work without importance weights.
        relative_mse: expected relative mean square rounding error.
        item_bytes: of one number of a graph that computes with it (ONNX): 4 or 2. Activations, cache and scales have
            the same precision, so all formats of a plan agree in it.
        zero_point_bits: of every block's zero point, packed row by row behind the scales (ONNX); 0: symmetric.
        input_block: columns of what the matrix is multiplied with that the runtime rounds to int8 under one scale, on
            processors; 0: it multiplies in floating point.
        effort: of rounding a thousand weights, in :attr:`acip_export.machine.Machine.calls`. tables: of rounding the
            first of a process, beside that.
        since: the first release of the format's default runtime that is known to read it; empty: every one in use does.
    """

    name: str
    format: str
    block: int
    block_bytes: int
    relative_mse: float
    pads_rows: bool = False
    needs_importance: bool = False
    item_bytes: int = 4
    zero_point_bits: int = 0
    input_block: int = 0
    effort: float = 140.0
    tables: float = 0.0
    since: str = ""

    @property
    def bits_per_weight(self) -> float:
        return (8 * self.block_bytes + self.zero_point_bits) / self.block

    @property
    def is_float(self) -> bool:
        return self.block == 1

    @property
    def code_bits(self) -> int:
        """Bits of one code of a quantized ONNX format."""
        return (self.block_bytes - self.item_bytes) * 8 // self.block

    def fits(self, columns: int) -> bool:
        """Whether a row of ``columns`` weights can be stored at all."""
        return columns > 0 and (self.pads_rows or columns % self.block == 0)

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of a ``rows`` x ``columns`` matrix.

        Raises:
            ValueError: the row does not fit the block (never silently widened).
        """
        if not self.fits(columns):
            raise ValueError(f"rows of {columns} weights do not fit {self.name} blocks of {self.block}")
        blocks = ceil_div(columns, self.block)
        return rows * (blocks * self.block_bytes + ceil_div(blocks * self.zero_point_bits, 8))


@dataclass(frozen=True)
class AllowedTypes:
    """The types that matrices may take, by the length of their rows.

    Attributes:
        types: of every row that they fit, most precise first or in the user's order.
        narrow: types with smaller blocks, for rows that not all of ``types`` fit. For the others they are no gain:
            types with larger blocks round better at the same bytes.
    """

    types: tuple[WeightType, ...]
    narrow: tuple[WeightType, ...] = ()

    def of_row(self, columns: int) -> tuple[WeightType, ...]:
        """Return the types that a row of ``columns`` weights may take."""
        fitting = tuple(t for t in self.types if t.fits(columns))
        if len(fitting) == len(self.types):
            return fitting
        return fitting + tuple(t for t in self.narrow if t.fits(columns) and t not in fitting)

    def only(self, names: Collection[str]) -> AllowedTypes:
        """Return those of these names."""
        types, narrow = (tuple(t for t in each if t.name in names) for each in (self.types, self.narrow))
        return AllowedTypes(types, narrow)

    def __bool__(self) -> bool:
        return bool(self.types)

    def __iter__(self) -> Iterator[WeightType]:
        return iter((*self.types, *(t for t in self.narrow if t not in self.types)))


def undominated(types: Sequence[WeightType]) -> tuple[WeightType, ...]:
    """Return the types than which no other takes as few bytes and rounds better, by the table's errors."""
    return tuple(
        t
        for t in types
        if not any(o.bits_per_weight <= t.bits_per_weight and o.relative_mse < t.relative_mse for o in types)
    )


def is_older(release: str, than: str) -> bool:
    """Tell whether a release of a runtime (``b9000``, ``1.22.1``) came before another one."""
    return _numbers(release) < _numbers(than)


def first_release(types: Iterable[WeightType]) -> str | None:
    """Return the first release of the format's runtime that is known to read all of ``types``; ``None``: any."""
    return max((t.since for t in types if t.since), key=_numbers, default=None)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", release))


def weight_type(format: str, name: str) -> WeightType:
    """Look a type up in the table of its format.

    Raises:
        KeyError: the format has no such type. UnsupportedError: there is no such format.
    """
    return _by_name(format)[name]


def types_of(format: str) -> tuple[WeightType, ...]:
    """Return all types of a format, most precise first.

    Raises:
        UnsupportedError: there is no such format.
    """
    rows: tuple[WeightType, ...] = load_format(format).weight_types
    return rows


@lru_cache
def _by_name(format: str) -> dict[str, WeightType]:
    return {row.name: row for row in types_of(format)}
