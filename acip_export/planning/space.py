"""The search space: what a plan may be made of, whatever its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from acip_export.formats.protocol import DEFAULT_BACKEND, ExportFormat, Layout
from acip_export.rounding.quantizer import Rounding
from acip_export.weight_types import AllowedTypes, WeightType


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

    @property
    def allowed(self) -> AllowedTypes:
        """The types by length of row: others join the default ones where those do not fit, but never named ones."""
        return AllowedTypes(self.types, self._narrow if self.types == self.default_types else ())

    @property
    def allowed_in_embedding(self) -> AllowedTypes:
        """The allowed types that an embedding may take, or else all that it can."""
        names = self.format.embedding_types
        wide = tuple(self.format.type(name) for name in names if name not in self.format.narrow_types)
        return self.allowed.only(names) or AllowedTypes(wide, self._narrow).only(names)

    @property
    def _narrow(self) -> tuple[WeightType, ...]:
        return tuple(self.format.type(name) for name in self.format.narrow_types)
