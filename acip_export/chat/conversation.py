"""One answer after the other from a runtime's session: what is computed again, which token is taken, when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import takewhile

import numpy as np

from acip_export.chat.protocol import Answer, Ending, Settings
from acip_export.errors import VerificationError
from acip_export.formats.session import ChatSession, Logits

# Of the most likely token's chance: below it a token is never drawn.
_LEAST_CHANCE = 0.05


class Conversation:
    """Holds what the session has computed, so that only what is new is computed.

    Args:
        context: tokens that the session has room for. memory: bytes that the process has held at most.
    """

    def __init__(self, session: ChatSession, context: int, memory: Callable[[], int | None] = lambda: None) -> None:
        self._session, self._context, self._memory = session, context, memory
        self._held: list[int] = []
        self._ending: Ending | None = "end"

    def ask(self, text: str, begin: bool, settings: Settings, room: int = 1) -> int | None:
        """Compute what is before an answer. Of a text that leaves no ``room``, its tokens are returned."""
        tokens = self._session.encode(text, begin)
        if len(tokens) + room > self._context:
            return len(tokens)
        if not tokens:
            raise VerificationError("the model's tokenizer makes no token of an empty text; write something")
        start = time.perf_counter()
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, tokens, strict=False)))
        # The last token is computed in any case: its logits are what is asked for.
        self._kept = self._session.rewind(min(known, len(tokens) - 1))
        self._logits = self._session.extend(tokens[self._kept :])
        self._held, self._prompt = list(tokens), len(tokens)
        self._prompt_seconds = time.perf_counter() - start
        self._settings, self._ending = settings, None
        self._chance = np.random.default_rng(settings.seed)
        self._write = self._session.stream()
        self._count, self._steps, self._seconds = 0, 0, 0.0
        self._pending: int | None = None
        return None

    def next(self) -> str:
        """Return the next piece of the answer, which may be empty; :attr:`ending` tells whether it was the last."""
        start = time.perf_counter()
        if self._pending is not None:
            self._logits = self._session.extend([self._pending])
            self._held.append(self._pending)
            self._steps += 1
        token = choose(self._logits, self._settings.temperature, self._chance)
        if self._pending is not None:
            self._seconds += time.perf_counter() - start
        if token in self._session.ends:
            self._ending = "end"
            return ""
        self._pending = token
        self._count += 1
        if self._count >= self._settings.max_tokens:
            self._ending = "length"
        elif len(self._held) + 1 >= self._context:
            self._ending = "context"
        return self._write(token)

    def stop(self) -> None:
        """End the answer here."""
        self._ending = self._ending or "stopped"

    def answer(self) -> Answer | None:
        """Return what the answer took, once it has ended."""
        if self._ending is None:
            return None
        speed = self._steps / self._seconds if self._steps else None
        return Answer(
            self._ending, self._count, self._prompt, self._kept, self._prompt_seconds, speed, self._memory()
        )  # fmt: skip


def choose(logits: Logits, temperature: float, chance: np.random.Generator) -> int:
    """Return a token of (vocabulary,) logits.

    Raises:
        VerificationError: they are no numbers.
    """
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise VerificationError(
            "the model computes no numbers (NaN or infinity); verify it:  acip-export verify EXPORT"
        )
    if temperature <= 0:
        return best
    # Of the few that may be drawn: in eight bytes a token, a large vocabulary would take megabytes.
    drawn = np.flatnonzero(logits >= logits[best] + temperature * math.log(_LEAST_CHANCE))
    weights = np.exp((logits[drawn].astype(np.float64) - logits[best]) / temperature)
    return int(drawn[chance.choice(len(drawn), p=weights / weights.sum())])
