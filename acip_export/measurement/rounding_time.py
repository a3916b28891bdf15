"""Estimate how long :mod:`acip_export.measurement.rounding_errors` takes, from sizes alone.

docs/LOG.md has the measurements that the figures are from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from acip_export.lowrank.feedback_cache import LEAST_COLUMNS, MOST_BYTES, entry_bytes
from acip_export.lowrank.moments import SORTED_COLUMNS
from acip_export.machine import Machine
from acip_export.materialization.refit import ROUNDS
from acip_export.measurement.rounding_errors import LARGEST_SIDE, measured_ranks, sampled_rows, spread
from acip_export.weight_types import WeightType

# Of a moment of n columns: its root in float32, unpacking it, its factor for error feedback with columns sorted again
# and as they are, in cubes of n in float64; passes over an entry, in calls.
_ROOT, _UNPACKED, _SORTED_FACTOR, _WIDE_FACTOR, _BY_ENTRY = 0.7, 3.3, 2.4, 1.2, 0.05
# Carrying the error of a column, in calls, and unpacking an entry of its row of the factor.
_BY_COLUMN, _BY_FACTOR_ENTRY = 1.0, 0.009
# Reading, scaling and squaring a weight, in calls.
_BY_WEIGHT = 0.02
# A few rows times a large matrix reach this share of the speed of products.
_REACHED_BY_ROWS = 0.5
# Components of a layer, in cubes of its smaller side.
_COMPONENTS = 12.0


@dataclass(frozen=True)
class RoundingWork:
    """Hold the sizes that measuring a format's types depends on.

    Attributes:
        shapes: of the tensors that are rounded. types: that each may take.
        inputs: columns of the second moments that they are rounded with.
        layers: those that may become pairs. pairs: their types, (down, up).
        feedback_types: types that are rounded with error feedback.
        whole: tensors are rounded whole, and their losses are not measured.
        factors_kept: the factors of wide inputs are in the user's cache, as many as it has room for.
    """

    shapes: Mapping[str, tuple[int, int]]
    types: Mapping[str, Sequence[WeightType]]
    inputs: Sequence[int]
    layers: Sequence[str]
    pairs: Sequence[tuple[WeightType, WeightType]]
    feedback_types: Collection[str]
    whole: bool = False
    factors_kept: bool = False

    def seconds(self, machine: Machine) -> float:
        """Return about how long it takes."""
        products, carried, calls, kept = 0.0, 0.0, 0.0, 0
        for columns in self.inputs:
            read = self.factors_kept and columns >= LEAST_COLUMNS and kept + entry_bytes(columns) <= MOST_BYTES
            kept += entry_bytes(columns) if read else 0
            products += (_ROOT + (_factor(columns) if self.feedback_types and not read else 0.0)) * columns**3
            calls += _BY_ENTRY * columns**2
        for name, types in self.types.items():
            rows, columns = self.shapes[name]
            calls += _BY_WEIGHT * rows * columns
            sampled = rows if self.whole else sampled_rows(rows, columns)
            if self.whole:
                carried += sum(form.name in self.feedback_types for form in types) * 2 * rows * columns**2
            else:
                products += len(types) * 2 * sampled * columns**2 / _REACHED_BY_ROWS
            calls += sum(self._rounding(form, sampled, columns) for form in types)
        for layer in spread(self.layers) if self.pairs else ():
            more = self._pairs(*self.shapes[f"{layer}.weight"])
            products, calls = products + more[0], calls + more[1]
        tables = {form.name: form.tables for types in self.types.values() for form in types}
        return carried / machine.float32 + products / machine.float64 + (calls + sum(tables.values())) / machine.calls

    def _rounding(self, form: WeightType, rows: int, columns: int, feedback: bool = True) -> float:
        """Count the calls that rounding a matrix takes as long as."""
        carried = feedback and form.name in self.feedback_types
        by_column = _BY_COLUMN + _BY_FACTOR_ENTRY * columns if carried else 0.0
        return form.effort * rows * columns / 1000 + by_column * columns

    def _pairs(self, out: int, inputs: int) -> tuple[float, float]:
        """Count operations in float64, and calls, of measuring one layer's pairs."""
        products = _UNPACKED * (inputs**3 + min(out, inputs) ** 3)
        if max(out, inputs) > 2 * LARGEST_SIDE:
            out, inputs = min(out, LARGEST_SIDE), min(inputs, LARGEST_SIDE)
        full, calls = min(out, inputs), 0.0
        products += _COMPONENTS * full**3 + 4 * full * (out**2 + inputs**2)
        for down, up in self.pairs:
            for rank in measured_ranks(full, up) if down.fits(inputs) else ():
                wide, sides = out + inputs, out**2 + inputs**2
                # Both factors fitted to each other, and the loss of their product: materialization/refit.py.
                products += ROUNDS * (rank * (6 * sides + 2 * inputs**2) + rank**2 * (14 * wide) + 2 * rank**3)
                down_calls = self._rounding(down, rank, inputs)
                calls += ROUNDS * (down_calls + self._rounding(up, out, rank, feedback=False))
        return products, calls


def _factor(columns: int) -> float:
    return _SORTED_FACTOR if columns <= SORTED_COLUMNS else _WIDE_FACTOR
