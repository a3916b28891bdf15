"""What a conversation's process is asked, and what it answers: one JSON document a line."""

from __future__ import annotations

from typing import Literal

import msgspec

Ending = Literal["end", "length", "context", "stopped"]


class Settings(msgspec.Struct, frozen=True):
    """How an answer is chosen.

    Attributes:
        max_tokens: of an answer. temperature: 0 takes the most likely token; above, tokens of less than a twentieth of
            the likeliest one's chance are left out. seed: the same seed draws the same tokens.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


class Opened(msgspec.Struct, frozen=True):
    """The first line: the model is there, or why it is not.

    Attributes:
        tokens: special tokens by the names that chat templates have for them.
        missing: the fields of a :class:`~acip_export.errors.MissingExtraError`.
    """

    runtime: str = ""
    tokens: dict[str, str] = {}
    load_seconds: float = 0.0
    missing: tuple[str, str, str, str | None] | None = None
    error: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Begin an answer to ``text``.

    Attributes:
        begin: with the token that begins texts; templates write their own. room: tokens that have to be left for the
            answer.
    """

    text: str
    begin: bool
    settings: Settings
    room: int = 1


class Next(msgspec.Struct, frozen=True, tag=True):
    """Go on: there is a next piece of text for every such line."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The answer is long enough."""


Request = Ask | Next | Stop


class Asked(msgspec.Struct, frozen=True):
    """A request with its number, which the reply repeats: whoever was interrupted while waiting for one asks on."""

    number: int
    request: Request


class Answer(msgspec.Struct, frozen=True):
    """What an answer took.

    Attributes:
        ending: what ended it: the model, ``max_tokens``, a full context, or who asked.
        tokens: of the answer. prompt_tokens: of the conversation before it, of which ``kept_tokens`` were computed
            before. tokens_per_second: after the first one; ``None`` where there is no second one.
        memory_bytes: the most that the process has held, without its interpreter; ``None`` where the system has no
            such figure.
    """

    ending: Ending
    tokens: int
    prompt_tokens: int
    kept_tokens: int
    prompt_seconds: float
    tokens_per_second: float | None
    memory_bytes: int | None


class Reply(msgspec.Struct, frozen=True):
    """To every request.

    Attributes:
        text: a piece of the answer. answer: when it has ended. too_long: tokens of a question that does not fit.
        number: of the request.
    """

    text: str = ""
    answer: Answer | None = None
    too_long: int | None = None
    error: str = ""
    number: int = 0
