"""Two anatomies, tensor by tensor. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from acip_export.inspection.anatomy import Anatomy

REST = "(not in tensors)"


@dataclass(frozen=True)
class Stored:
    """What a comparison needs to know of a tensor; see :class:`acip_export.inspection.anatomy.TensorPart`."""

    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TensorChange:
    """A tensor that is not stored as it was; ``None`` where it does not exist."""

    name: str
    before: Stored | None
    after: Stored | None

    @property
    def delta(self) -> int:
        """Bytes gained."""
        return (self.after.nbytes if self.after else 0) - (self.before.nbytes if self.before else 0)

    @property
    def what(self) -> str:
        """In words: ``q4_k → q8_0``, ``new, q8_0``, ``gone, was q4_k``, ``256x256 → 256x512``."""
        if self.before is None:
            return "new" if self.after is None else f"new, {self.after.type}"
        if self.after is None:
            return f"gone, was {self.before.type}"
        parts = []
        if self.before.type != self.after.type:
            parts.append(f"{self.before.type} → {self.after.type}")
        if self.before.shape != self.after.shape:
            parts.append(f"{extents(self.before.shape)} → {extents(self.after.shape)}")
        return ", ".join(parts) or "stored differently"


def extents(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def stored_tensors(anatomy: Anatomy) -> dict[str, Stored]:
    return {t.name: Stored(t.type, t.shape, t.nbytes) for t in anatomy.tensors}


def diff_tensors(before: Mapping[str, Stored], after: Mapping[str, Stored]) -> tuple[TensorChange, ...]:
    """Every tensor that differs, the largest change in bytes first, then by name."""
    changes = [
        TensorChange(name, before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    return tuple(sorted(changes, key=lambda change: (-abs(change.delta), change.name)))
