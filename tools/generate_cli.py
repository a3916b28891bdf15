"""Writes docs/cli.md from the commands themselves: ``make docs``. A test fails when it is stale."""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from acip_export.cli.help import help_of, panels_of
from acip_export.cli.main import app

FILE = Path(__file__).parents[1] / "docs" / "cli.md"
_HEAD = """\
<!-- Written by  make docs  from the commands themselves; edit their help texts instead. -->
# The command line

Results go to stdout, progress and diagnostics to stderr. Every command that reports something has `--json`: exactly one
JSON document on stdout, which in case of an error is `{"error", "code", "kind"}` and, where no plan fits,
`"floor_bytes"` and `"alternatives"`. Sizes are typed `4GB`, `900M`, `2GiB` or `50%` of the dense model's bytes; a flag
that takes one value is given once. `acip-export --install-completion` makes the shell complete commands, flags, formats
and devices. Existing output is refused without `--force`, and with it only what acip-export wrote is
replaced. Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 infeasible budget, 5 unsupported by the format,
6 verification or check failed, 7 missing extra, 130 interrupted.
"""


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [_HEAD, _index(group), _section("acip-export", group)]
    parts += [_section(f"acip-export {name}", command) for name, command in group.commands.items()]
    return "\n".join(parts)


def _index(group: Any) -> str:
    lines = ["| command | what it does |", "| --- | --- |", f"| [`acip-export`](#acip-export) | {_first(group)} |"]
    for name, command in group.commands.items():
        lines.append(f"| [`{name}`](#acip-export-{name}) | {_first(command)} |")
    return "\n".join(lines) + "\n"


def _first(command: Any) -> str:
    return str(inspect.cleandoc(command.help or "").partition("\n\n")[0]).replace("\n", " ")


def _section(title: str, command: Any) -> str:
    lines = [f"## {title}", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        text = paragraph.strip()
        lines += ["```console", f"$ {text}", "```", ""] if text.startswith("acip-export ") else [text, ""]
    # Examples that follow one another share a block.
    text = "\n".join(lines).replace("```\n\n```console\n", "")
    return text + "\n" + "\n".join(_parameters(command))


def _parameters(command: Any) -> Iterator[str]:
    """A table a panel, in the order of help."""
    for panel, parameters in panels_of(command, None).items():
        yield f"| {panel} | | |"
        yield "| --- | --- | --- |"
        for parameter in parameters:
            text = help_of(parameter, whole=True).replace("|", "\\|")
            yield f"| {_names(parameter)} | {_values(parameter)} | {text} |"
        yield ""


def _names(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return f"`{(parameter.metavar or parameter.name.upper()).strip('[]')}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _values(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    return ", ".join(dict.fromkeys(_words(parameter.type_descriptor.annotation))) or "text"


def _words(annotation: Any) -> Iterator[str]:
    """A type as a reader of a command line would call it."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (f"`{value}`" for value in get_args(annotation))
    elif origin in (typing.Union, types.UnionType, list):
        for argument in get_args(annotation):
            if argument is not type(None):
                yield from _words(argument)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        yield from (f"`{member.value}`" for member in annotation)
    else:
        yield {int: "integer", float: "number", Path: "path", str: "text"}.get(annotation, "text")


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
