"""What every runtime adapter offers. An adapter opens an export read-only and never changes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.report import Speed

Tokens = npt.NDArray[np.int64]
Windows = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32]


class ProbedSession(Protocol):
    """An opened export that can be measured in a process of its own. ``name`` says which runtime and version."""

    name: str

    def speed(self, prompt: list[int], new_tokens: int) -> Speed:
        """Forget everything, then process ``prompt`` in the plan's batches and ``new_tokens`` more one by one.

        Holds nothing beside what the runtime needs: the process's memory is measured around it.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class RuntimeSession(ProbedSession, Protocol):
    """An opened export of a language model."""

    def logits(self, windows: Windows) -> Iterator[Logits]:
        """For each window of ``windows`` (n, tokens): float32 (tokens, vocabulary). Log-probabilities are allowed."""
        ...

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``prompt``; end-of-text does not stop it."""
        ...

    def tokenize(self, text: str) -> list[int] | None:
        """The runtime's own tokens of ``text``: special ones recognised, none added. ``None``: it has no tokenizer."""
        ...


class ChatSession(Protocol):
    """An opened model that goes on from the tokens that it holds, for conversations.

    Attributes:
        name: runtime and version. ends: tokens that end an answer. tokens: special tokens as text, by the names that
            chat templates have for them.
    """

    name: str
    ends: frozenset[int]
    tokens: Mapping[str, str]

    def encode(self, text: str, begin: bool) -> list[int]:
        """Tokens of ``text``, special ones recognised; ``begin``: after the one that begins texts, if there is one."""
        ...

    def stream(self) -> Callable[[int], str]:
        """What turns the tokens of one answer into text; empty where a character is not whole yet."""
        ...

    def extend(self, tokens: Sequence[int]) -> Logits:
        """Compute ``tokens`` after those that are held: logits (vocabulary,) after the last one."""
        ...

    def rewind(self, position: int) -> int:
        """Forget all but the first ``position`` tokens, or all, where less cannot be. Returns how many are held."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class EncoderSession(ProbedSession, Protocol):
    """An opened export of an encoder."""

    def outputs(self, texts: Sequence[list[int]]) -> Vectors:
        """One row a text (token ids, special ones included): embedding or logits; of a masked language model, the
        mean of the logits over its tokens."""
        ...


def encoding_speed(session: EncoderSession, prompt: list[int], longest: int) -> Speed:
    """Of ``prompt`` cut into texts of ``longest`` tokens."""
    texts = [prompt[start : start + longest] for start in range(0, len(prompt), longest)]
    start = time.perf_counter()
    session.outputs(texts)
    return Speed(len(prompt) / (time.perf_counter() - start), None, len(prompt), 0)
