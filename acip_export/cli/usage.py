"""Say what the command line's parser refuses: what was found, what was expected, and what to type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args, get_origin

import typer

from acip_export.artifacts.names import MANIFEST_FILE
from acip_export.choices import instead_of, nearest
from acip_export.cli.options import MORE
from acip_export.devices import load_devices
from acip_export.errors import AcipError, UsageError
from acip_export.formats.registry import format_names
from acip_export.units import parse_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Flags that print something and end, whatever else is given.
_ENDS = ("help", "version")


def check_usage(command: Any, context: typer.Context, args: Sequence[str], takes_commands: bool) -> None:
    """Refuse flags that are given twice, names that are no choice, and words too many.

    Raises:
        UsageError: with what to type instead. Errors of the parser: see :func:`explained`.
    """
    if context.resilient_parsing:
        return
    try:
        given, words, order = command.make_parser(context).parse_args(args=list(args))
    except Exception as error:
        if getattr(error, "ctx", context) is None:
            vars(error)["ctx"] = context  # so that it is known whose help helps
        if context.command.name == "rank" and context.parent is not None:
            _refuse_flag_of_export(context.parent, getattr(error, "option_name", ""), args)
        raise
    if any(given.get(name) for name in _ENDS):
        return
    for parameter, times in Counter(order).items():
        # The last would win, and nobody would know.
        if times > 1 and is_flag(parameter) and not (parameter.multiple or parameter.is_flag):
            raise UsageError(f"{parameter.opts[0]} is given {times} times, and takes one value")
    for parameter in command.params:
        value = given.get(parameter.name)
        choices = choices_of(parameter)
        if choices and isinstance(value, str) and value not in choices:
            known = instead_of(value, choices, "it can be")
            raise UsageError(f"{parameter.opts[0]} cannot be {value!r}; {known}\n{_help_of(context)}")
    if words and not takes_commands:
        raise _ended(context, _too_many(command, words[0]))


def unknown_command(group: Any, context: typer.Context, word: str) -> UsageError:
    """Return the error for a word in the place of a command: a command like it, or the flag that it belongs to."""
    close = nearest(word, group.commands)
    if close:
        return _ended(context, f"has no command {word!r}; did you mean  {context.command_path} {close[0]}?")
    return _ended(context, f"has no command {word!r}{_instead(group, word)}")


def explained(error: Any) -> UsageError:
    """Return an error of the parser as one of ours, with where help is to be had.

    Args:
        error: of classes that typer keeps to itself.
    """
    message, context = error.format_message().replace("Value error, ", ""), getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):
        close = nearest(error.option_name, error.possibilities or ())
        message = f"there is no flag {error.option_name}{f'; did you mean  {close[0]}?' if close else ''}"
    elif hasattr(error, "param_type") and context is not None:  # missing
        told = f"{context.command_path} needs {_shown(error.param)}"
        message = f"{told}: {_decapitalized(error.param.help or '')}"
    elif "requires an argument" in message:
        message = f"{error.option_name} needs a value"
    return UsageError(message if context is None else f"{message}\n{_help_of(context)}")


def is_flag(parameter: Any) -> bool:
    """Whether a parameter is a flag, not a word."""
    return bool(parameter.opts[0].startswith("-"))


def choices_of(parameter: Any) -> tuple[str, ...]:
    """Return the names that a flag takes, if it takes only these."""
    annotation = parameter.type_descriptor.annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _refuse_flag_of_export(main: Any, flag: str, args: Sequence[str]) -> None:
    """Raise UsageError for a flag that ``rank`` has not, and the export that follows has, with the command to type."""
    parameter = next((each for each in main.command.params if flag in (*each.opts, *each.secondary_opts)), None)
    if parameter is None or parameter.rich_help_panel == MORE:
        return
    name = flag if flag in parameter.secondary_opts else max(parameter.opts, key=len)
    typed = {"--device": "NAME"} if parameter.name == "device" else {"--budget": "4GB", "--format": "gguf"}
    typed[name] = "" if parameter.is_flag else quote(_value_of(flag, args))
    flags = " ".join(f"{flag} {value}".strip() for flag, value in typed.items())
    raise UsageError(
        f"{name} belongs to the export, not to the ranking: one ranking serves every size and format. Rank without it; "
        f"then, in the model's directory:\n  {main.command_path} {flags}"
    )


def _value_of(flag: str, args: Sequence[str]) -> str:
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            found = value if equals else next(iter(args[at + 1 :]), "-")
            return "VALUE" if found.startswith("-") else found
    return "VALUE"


def _too_many(command: Any, word: str) -> str:
    takes = [_shown(parameter) for parameter in command.params if not is_flag(parameter)]
    told = (
        f"takes {' and '.join(takes)}, and {word!r} is one word more"
        if takes
        else (f"takes flags only, and {word!r} is none")
    )
    return told + _instead(command, word)


def _instead(command: Any, word: str) -> str:
    """Say which flag of a command takes a word like this."""
    parameters = {parameter.name: parameter for parameter in command.params if is_flag(parameter)}
    has_words = any(not is_flag(parameter) for parameter in command.params)
    for name in _meant(word, has_words):
        if name in parameters:
            return f"; write  {max(parameters[name].opts, key=len)} {quote(word)}"
    if "config" in parameters and not has_words:
        return f"; what it works on is named in the file of  --config ({_decapitalized(parameters['config'].help)})"
    return ""


def _meant(word: str, has_words: bool) -> Iterator[str]:
    """Yield the parameters that a word may have been meant for, the likeliest first."""
    path, lower = Path(word), word.lower()
    tests: tuple[tuple[str, Callable[[], object]], ...] = (
        ("format_", lambda: lower in format_names()),
        ("budget", lambda: parse_bytes(word, whole=lambda: 1000)),
        ("scores", lambda: path.suffix == ".acip"),
        ("device", lambda: lower in load_devices()),
        ("bundle", lambda: (path / MANIFEST_FILE).is_file()),
        ("model", lambda: path.is_dir() or (_HUB_ID.fullmatch(word) and not path.exists())),
        ("config", lambda: path.suffix == ".toml"),
        ("data", path.is_file),
        ("text", path.is_file),
        # The second of two, as of  cp.
        ("out", lambda: has_words and not path.exists()),
    )
    for name, fits in tests:
        with suppress(AcipError, OSError):  # a word may be too long for the name of a file
            if fits():
                yield name


def _shown(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()).strip("[].")


def _decapitalized(sentence: str) -> str:
    begins_with_name = sentence[1:2].isupper()
    return (sentence if begins_with_name else sentence[:1].lower() + sentence[1:]).removesuffix(".")


def _ended(context: typer.Context, message: str) -> UsageError:
    return UsageError(f"{context.command_path} {message}\n{_help_of(context)}")


def _help_of(context: Any) -> str:
    return f"{context.command_path} -h  shows what it takes"
