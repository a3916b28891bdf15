"""What every runtime adapter offers. An adapter opens an export read-only and never changes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Windows = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Speed:
    """Tokens per second on this machine: of a prompt of ``prompt_tokens``, then of ``new_tokens`` one by one."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int


class RuntimeSession(Protocol):
    """An opened export. ``name`` says which runtime and version."""

    name: str

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """For each window of ``windows`` (n, tokens): float32 (tokens, vocabulary). Log-probabilities are allowed."""
        ...

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``prompt``; end-of-text does not stop it."""
        ...

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        """Forget everything, then process ``prompt`` in the plan's batches and ``new_tokens`` more one by one.

        Holds nothing beside what the runtime needs: the process's memory is measured around it.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
