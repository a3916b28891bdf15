"""The project file: ``acip-export.toml`` keeps the options of named exports. See docs/project-file.md.

A table holds flags of the main job, and becomes its arguments. Which there are, and what they take, is read from the
command itself, so that a new flag is a new key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, get_origin

import msgspec
from msgspec import Meta

from acip_export.choices import instead_of, nearest
from acip_export.cli.usage import explained
from acip_export.errors import AcipError, UsageError
from acip_export.io.inputs import Finite, convert, read_toml

PROJECT_FILE = "acip-export.toml"

_LARGEST = 2**63 - 1
_EXAMPLE = """[export.phone]
format = "gguf"
budget = "900MB"
context = 4096"""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Text = Annotated[str, Meta(min_length=1, max_length=1000)]
Integer = Annotated[int, Meta(ge=-_LARGEST, le=_LARGEST)]
Texts = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=100)]


@dataclass(frozen=True)
class NamedExport:
    """One table of the file.

    Attributes:
        place: in the file, for messages. arguments: of the main job. out: below the file's directory.
        several: whether it has several budgets, and ``out`` an export for each.
    """

    name: str
    place: str
    arguments: tuple[str, ...]
    out: Path
    several: bool

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the place in the file before what an error says."""
        try:
            yield
        except AcipError as error:
            error.args = (f"{self.place}: {error}",)
            raise
        except Exception as error:
            if not hasattr(error, "format_message"):  # of the parser, whose classes typer keeps to itself
                raise
            raise UsageError(f"{self.place}: {explained(error)}") from error


@dataclass(frozen=True)
class Project:
    """``file``: where it was read from; its directory is the one that exports are made in."""

    file: Path
    exports: Mapping[str, NamedExport]

    def choose(self, names: list[str]) -> list[NamedExport]:
        """Return the exports of these names; all of them without any.

        Raises:
            UsageError: there is none of a name, or a name is given twice.
        """
        for name in names:
            if name not in self.exports:
                raise UsageError(f"{self.file} has no export {name!r}; {instead_of(name, self.exports)}")
            if names.count(name) > 1:
                raise UsageError(f"{name} is given {names.count(name)} times; an export is made once")
        return [self.exports[name] for name in names or self.exports]

    def place_of(self, name: str) -> str:
        """Return the directory of an export.

        Raises:
            UsageError: there is none of this name, or it has several budgets.
        """
        (export,) = self.choose([name])
        if export.several:
            raise UsageError(f'{export.place} has several budgets; name its sizes by  glob = "{export.out}/*-*"')
        return export.out.as_posix()


def load_project(file: Path, group: Any) -> Project:
    """Read and check a project file.

    Args:
        group: the command line, whose main job says which keys there are.

    Raises:
        UsageError: unreadable, unknown keys, wrong types, paths that leave its directory, two exports in one place.
    """
    flags = _flags(group)
    table = msgspec.defstruct(
        "Export",
        [(p.name, _kind(p) | None, msgspec.field(name=key, default=None)) for key, p in flags.items()],
        frozen=True,
        forbid_unknown_fields=True,
    )
    schema = msgspec.defstruct("ProjectFile", [("export", dict[Name, table])], forbid_unknown_fields=True)  # type: ignore[valid-type]
    document = read_toml(file, UsageError, f". Write one, for example:\n\n{_EXAMPLE}")
    tables = convert(document, schema, str(file), lambda message: _expected(message, flags)).export  # type: ignore[attr-defined]
    if not tables:
        raise UsageError(f"{file} has no exports. Write one, for example:\n\n{_EXAMPLE}")
    exports = {name: _export(name, options, f"{file}: $.export.{name}", flags) for name, options in tables.items()}
    for one, other in permutations(exports.values(), 2):
        if one.out == other.out or one.out in other.out.parents:
            raise UsageError(f"{other.place}: {other.out} is where {one.name} goes, too; give each its own  out")
    return Project(file, exports)


def _flags(group: Any) -> dict[str, Any]:
    """Return the parameters of the main job that a file may keep, by key: all that ``build`` does not take itself."""
    of_the_call = {parameter.name for parameter in group.commands["build"].params}
    return {
        parameter.opts[0].removeprefix("--"): parameter
        for parameter in group.params
        if parameter.name not in of_the_call
        and parameter.expose_value
        and not (parameter.is_eager or getattr(parameter, "hidden", False))
    }


def _kind(parameter: Any) -> Any:
    """Return the type that a flag's value has in the file."""
    annotation = parameter.type_descriptor.annotation
    if annotation is bool:
        return bool
    if parameter.multiple or parameter.metavar == "NAMES":
        return Text | Texts
    if get_origin(annotation) is Literal:
        return annotation
    if annotation in (int, float):
        return Integer if annotation is int else Finite
    # A number of tokens may be a word, too.
    return Text | Integer if parameter.metavar == "TOKENS" else Text


def _expected(message: str, flags: Mapping[str, Any]) -> UsageError:
    unknown = message.rpartition("unknown field ")[2].strip()
    close = nearest(unknown, flags) if "unknown field" in message else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return UsageError(
        f"{message}{hint}\nThe file has a table [export.NAME] for each export, whose keys are flags of  acip-export: "
        f"{', '.join(flags)}"
    )


def _export(name: str, options: Any, place: str, flags: Mapping[str, Any]) -> NamedExport:
    values = {key: getattr(options, parameter.name) for key, parameter in flags.items()}
    values["out"] = values["out"] or f"export/{name}"
    arguments: list[str] = []
    for key, value in values.items():
        parameter, where = flags[key], f"{place}.{key}"
        listed = value if isinstance(value, tuple) else (value,)
        if not all(text.isprintable() for text in listed if isinstance(text, str)):
            raise UsageError(f"{where} must be printable, it is {value!r}")
        if value is not None and (set((parameter.metavar or "").split("|")) & {"FILE", "DIR"}):
            _check_below(value, where)
        if isinstance(value, bool):
            arguments += [f"--{key}"] if value else parameter.secondary_opts[:1]
        elif value is not None:
            # With the sign of equality no value is taken for a flag.
            joined = listed if parameter.multiple else (",".join(map(str, listed)),)
            arguments += [f"--{key}={each}" for each in joined]
    budgets = [each.removeprefix("--budget=") for each in arguments if each.startswith("--budget=")]
    several = len(budgets) > 1 or any(".." in each for each in budgets)
    return NamedExport(name, place, tuple(arguments), Path(values["out"]), several)


def _check_below(value: str, where: str) -> None:
    """Raise UsageError for a path that leaves the file's directory, on any system."""
    path = PureWindowsPath(value)
    if path.drive or path.root or ".." in path.parts or value.startswith("~"):
        raise UsageError(
            f"{where} is {value!r}; paths are relative to the file and stay below its directory. Link there what lies "
            "elsewhere"
        )
