"""What every stage tells while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageProgress:
    """``done`` of ``total`` units of a stage (``None``: not known beforehand); ``item`` is what was finished last."""

    stage: str
    done: int
    total: int | None
    item: str


ProgressCallback = Callable[[StageProgress], None]


def quiet(_: StageProgress) -> None:
    """The callback that draws nothing."""
