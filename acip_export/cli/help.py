"""Commands as people see them: help that fits 80 columns, and flags that are given once and where they belong."""

from __future__ import annotations

import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from acip_export.cli import output as console
from acip_export.cli.options import PANELS
from acip_export.cli.usage import check_usage, choices_of, is_flag, unknown_command
from acip_export.errors import UsageError

_WIDEST_NAMES = 28
_LONGEST_SENTENCE = 63


class Command(TyperCommand):
    """A command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        check_usage(self, ctx, args, takes_commands=False)
        return list(super().parse_args(ctx, args))


class Group(TyperGroup):
    """The main job, and the commands beside it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; raise UsageError for what is none, and for the main job as many would call it."""
        if args[:1] == ["export"]:
            raise UsageError("exporting is no command; leave the word out:  acip-export --budget 4GB --format gguf")
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            raise unknown_command(self, ctx, args[0])
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        check_usage(self, ctx, args, takes_commands=True)
        return list(super().parse_args(ctx, args))


def refuse_flags_before(command: str, context: typer.Context, allowed: tuple[str, ...]) -> None:
    """Raise UsageError for flags of the main job that stand before a command, which would not see them."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name not in allowed and given is not None and given.name == "COMMANDLINE":
            flag = parameter.opts[0]
            raise UsageError(
                f"{flag} stands before {command}, which does not see it; write  acip-export {command} {flag}"
            )


def _help(command: Any, context: typer.Context) -> str:
    """Return what help says, drawn for the console."""
    with console.out.capture() as drawn:
        _draw_help(command, context)
    return drawn.get().rstrip("\n")


def _draw_help(command: Any, context: typer.Context) -> None:
    """Usage, what it does with examples, commands, then flags by panel."""
    out = console.out
    first, *paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    takes = ["COMMAND"] if isinstance(command, TyperGroup) else []
    takes += [str(each.metavar or each.name.upper()) for each in command.params if not is_flag(each)]
    out.print(Text(" ".join(["Usage:", context.command_path, "[FLAGS]", *takes]), style="bold"))
    out.print(Text(first.replace("\n", " ")))
    for paragraph in paragraphs:
        example = paragraph.split()[0] in ("acip-export", "accelerate", "torchrun")
        text = Text(paragraph.strip() if example else paragraph.replace("\n", " "), style="green" if example else "")
        out.print(Padding(text, (0, 0, 0, 2 if example else 0)))
    if isinstance(command, TyperGroup):
        rows = [(f"[cyan]{name}[/]", _in_a_line(each)) for name, each in command.commands.items()]
        _show_panel("Commands", rows)
    for panel, parameters in panels_of(command, context).items():
        _show_panel(panel, [(_names(parameter), escape(help_of(parameter))) for parameter in parameters])


def panels_of(command: Any, context: typer.Context | None) -> dict[str, list[Any]]:
    """Return what a command takes by heading, in the order of help; with a context its ``--help``, too."""
    parameters = command.params if context is None else command.get_params(context)
    panels: dict[str, list[Any]] = defaultdict(list)
    for parameter in parameters:
        if not getattr(parameter, "hidden", False) and parameter.name != "show_completion":
            panels[_panel(parameter)].append(parameter)
    before_last = len(PANELS) - 1.5
    order = sorted(panels, key=lambda name: (PANELS.index(name) if name in PANELS else before_last, name))
    return {name: panels[name] for name in order}


def _panel(parameter: Any) -> str:
    """Return the heading that a parameter stands under."""
    if not is_flag(parameter):
        return "Arguments"
    if parameter.name in ("help", "install_completion"):
        return PANELS[-1]
    return str(getattr(parameter, "rich_help_panel", None) or "Options")


def help_of(parameter: Any, whole: bool = False) -> str:
    """Return the help of a parameter, with its default where that says something: one line, or the ``whole`` of it."""
    line, _, more = (parameter.help or "").partition("\n\n")
    text = f"{line} {more}".strip() if whole else line
    default = parameter.default
    if default is None or default == "" or isinstance(default, bool) or "default" in text.lower():
        return text
    return f"{text} (default {default:g})" if isinstance(default, float) else f"{text} (default {default})".strip()


def _in_a_line(command: Any) -> str:
    """What a command does, without what its own help adds."""
    sentence = inspect.cleandoc(command.help or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")
    sentence = sentence.partition(": ")[0]
    return escape(sentence if len(sentence) <= _LONGEST_SENTENCE else sentence.rpartition(", ")[0] or sentence)


def _show_panel(name: str, rows: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    widest = max(Text.from_markup(names).cell_len for names, _ in rows)
    table.add_column(width=min(widest, _WIDEST_NAMES), overflow="fold")
    table.add_column(overflow="fold")
    for names, text in rows:
        table.add_row(names, text)
    console.out.print(Rule(f"[bold]{name}[/]", align="left", style="dim"))
    console.out.print(Padding(table, (0, 0, 0, 2)))


def _names(parameter: Any) -> str:
    if not is_flag(parameter):
        return f"[cyan]{escape(parameter.metavar or parameter.name.upper())}[/]"
    names = sorted(parameter.opts, key=len)
    if parameter.secondary_opts:
        names = [f"--[no-]{names[-1].removeprefix('--')}"]
    shown = f"[cyan]{escape(', '.join(names))}[/]"
    return shown if getattr(parameter, "is_flag", False) else f"{shown} {escape(_value(parameter))}"


def _value(parameter: Any) -> str:
    """What a flag takes, in capitals, or its choices."""
    annotation = parameter.type_descriptor.annotation
    if parameter.metavar:
        return str(parameter.metavar)
    if choices := choices_of(parameter):
        return "|".join(choices)
    return {int: "N", float: "X", Path: "PATH"}.get(annotation, "NAME")
