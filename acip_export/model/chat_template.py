"""A tokenizer's chat template: where it is, and how a conversation is written with it."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from acip_export.errors import CheckpointError, InputError
from acip_export.io.atomic import read_json_object
from acip_export.io.inputs import open_input

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"

# ``{"role": "system" or "user" or "assistant", "content": text}``, as every template reads it.
Message = Mapping[str, str]


def find_chat_template(directory: Path, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the template of a directory with a tokenizer, as transformers finds it; ``None``: it has none.

    Args:
        options: ``tokenizer_config.json``, where it was read before.

    Raises:
        CheckpointError: a file is damaged.
    """
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            with open_input(file, CheckpointError) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
                return text.read()
        except UnicodeDecodeError as reason:
            raise CheckpointError(f"{file} is no UTF-8: {reason.reason} at byte {reason.start}") from None
    if options is None:
        config = directory / _TOKENIZER_CONFIG
        options = read_json_object(config, CheckpointError) if config.is_file() else {}
    template = options.get("chat_template")
    if isinstance(template, (tuple, list)):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


class ChatTemplate:
    """A template that writes conversations, in the environment that Hugging Face documents for templates.

    Args:
        text: in Jinja. tokens: what it may insert by name: ``bos_token``, ``eos_token``.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None) -> None:
        self._text, self._tokens = text, dict(tokens or {})

    @cached_property
    def _template(self) -> Template:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """``{% generation %}`` marks what an assistant said, for training; it changes no text."""

            tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

            def parse(self, parser: Any) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.Scope(body, lineno=line)

        def dump(value: Any, indent: int | None = None, **_: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = dump
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment.from_string(self._text)

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """Write a conversation, with what begins the next ``answer``.

        Raises:
            InputError: the template refuses it.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=answer, **self._tokens
            )
        except Exception as error:  # templates raise whatever they like, jinja2's own errors included
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error


class _RefusedError(Exception):
    """What a template raises on purpose."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)
