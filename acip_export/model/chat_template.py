"""A tokenizer's chat template: where it is, and how a conversation is written with it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError, InputError
from acip_export.io.atomic import read_json_object
from acip_export.io.inputs import open_input
from acip_export.model.template_process import TemplateError, TemplateProcess

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
        named = dict(map(_named, template))
        if None in named:
            raise CheckpointError(
                f"{directory / _TOKENIZER_CONFIG}: chat_template is a list of something else than objects with texts "
                "name and template"
            )
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory / _TOKENIZER_CONFIG}: chat_template is no text, and no list of them")
    return template


def _named(entry: Any) -> tuple[str | None, str]:
    """The name and text of one of several templates; no name: it is none."""
    name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
    return (name, text) if isinstance(name, str) and isinstance(text, str) else (None, "")


class ChatTemplate:
    """A template that writes conversations, in the environment that Hugging Face documents for templates.

    Args:
        text: in Jinja. tokens: what it may insert by name: ``bos_token``, ``eos_token``.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None) -> None:
        self._text, self._tokens = text, dict(tokens or {})
        self._process = TemplateProcess()

    def render(self, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
        """Write a conversation, with what begins the next ``answer``.

        Raises:
            InputError: the template refuses it, does not end, or takes too much memory.
        """
        request = {
            "template": self._text,
            "tokens": self._tokens,
            "messages": [dict(message) for message in messages],
            "answer": answer,
        }
        try:
            return self._process.render(request)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error
