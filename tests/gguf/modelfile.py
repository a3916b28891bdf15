"""Ollama's Modelfile, read by the rules of its reference (docs.ollama.com/modelfile).

One instruction and its arguments a line, comments with #, several lines between triple quotes; instructions in any
order and any case, FROM required.
"""

from __future__ import annotations

import re

INSTRUCTIONS = {"from", "parameter", "template", "system", "adapter", "license", "message", "requires"}
# The reference's table, and of the options of its API (docs/api.md) two that are not in it.
PARAMETERS: dict[str, type] = {
    "num_ctx": int,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "temperature": float,
    "seed": int,
    "stop": str,
    "num_predict": int,
    "draft_num_predict": int,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "num_batch": int,
    "num_gpu": int,
}
_INSTRUCTION = re.compile(r'([A-Za-z]+)[ \t]+("""(?:.|\n)*?"""|[^\n]+)(?:\n|$)')


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions in lower case and their arguments.

    Raises:
        ValueError: no Modelfile.
    """
    found, position = [], 0
    while position < len(text):
        skipped = re.compile(r"[ \t]*(#[^\n]*)?(\n|$)").match(text, position)
        if skipped is not None and skipped.end() > position:
            position = skipped.end()
            continue
        match = _INSTRUCTION.match(text, position)
        if match is None or match[1].lower() not in INSTRUCTIONS:
            raise ValueError(f"no instruction: {text[position : position + 60]!r}")
        arguments = match[2].strip()
        for quotes in ('"""', '"'):
            if arguments.startswith(quotes):
                if len(arguments) < 2 * len(quotes) or not arguments.endswith(quotes):
                    raise ValueError(f"quotes are not closed: {arguments[:60]!r}")
                arguments = arguments[len(quotes) : -len(quotes)]
                break
        found.append((match[1].lower(), arguments))
        position = match.end()
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM")
    return found


def parameters(text: str) -> dict[str, object]:
    """Those that are set. Raises ValueError: one that there is not, or a value of another type."""
    found = {}
    for instruction, arguments in parse(text):
        if instruction == "parameter":
            name, _, value = arguments.partition(" ")
            if name not in PARAMETERS:
                raise ValueError(f"no parameter {name!r}")
            found[name] = PARAMETERS[name](value.strip())
    return found
