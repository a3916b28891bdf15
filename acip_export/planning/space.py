"""The search space: what a plan may be made of, whatever its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat, Layout
from acip_export.rounding import Rounding
from acip_export.weight_types import WeightType


@dataclass(frozen=True)
class SearchSpace:
    """What the planner chooses from.

    Attributes:
        format: the file format, as ``backend`` has it.
        layout: how the model is arranged in its files.
        types: weight types that matrices may take, most precise first or in the user's order.
        backend: the name of what computes the export.
        options: what the user tells the format, by name.
        rounding: how codes are chosen.
    """

    format: ExportFormat
    layout: Layout
    types: tuple[WeightType, ...]
    backend: str = DEFAULT_BACKEND
    options: Mapping[str, str] = field(default_factory=dict)
    rounding: Rounding = "nearest"

    @property
    def default_types(self) -> tuple[WeightType, ...]:
        """The types that are chosen from when the user names none."""
        return self.format.choose_types(())
