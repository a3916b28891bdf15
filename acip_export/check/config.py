"""Read what is to be checked: ``acip-check.toml`` or ``[tool.acip-export.check]`` in pyproject.toml (docs/check.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from acip_export.artifacts.plan import LONGEST_FILE_NAME
from acip_export.errors import UsageError
from acip_export.io.inputs import Count, Finite, PositiveFloat, convert, read_toml
from acip_export.units import format_bytes, parse_bytes

CONFIG_FILE = "acip-check.toml"
LOCK_FILE = "acip-check.lock.json"

Missing = Literal["fail", "skip"]

Text = Annotated[str, Meta(min_length=1, max_length=1000)]
Number = Count | Finite
# From the name of an export in a project file to where it is written, below the directory of that file.
PlaceOf = Callable[[str], str]
_LIMITS = ("max_bytes", "max_growth", "min_recovery", "max_load_time_ratio")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_EXAMPLE = """[[check]]
name = "phone"
path = "export/gguf"
max_bytes = "900MB"
max_growth = ["1%", "5MB"]
min_recovery = 0.95"""


class EntryTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A ``[[check]]`` as it is written down; see :class:`Entry`.

    Bytes without a unit are read here, so that the message that refuses them can name one.
    """

    name: Text | None = None
    path: Text | None = None
    glob: Text | None = None
    export: Text | None = None
    max_bytes: Number | Text | None = None
    max_growth: Number | Text | tuple[Text, ...] | None = None
    min_recovery: Number | Text | None = None
    max_load_time_ratio: PositiveFloat | None = None
    missing: Missing = "fail"


class CheckFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document ``acip-check.toml``."""

    check: tuple[EntryTable, ...]


class OwnTool(msgspec.Struct, frozen=True):
    """The table ``[tool.acip-export]``."""

    check: Any = None


class Tools(msgspec.Struct, frozen=True):
    """The table ``[tool]`` of a pyproject.toml; other tools' tables are ignored."""

    acip_export: OwnTool = msgspec.field(name="acip-export", default=OwnTool())


class Project(msgspec.Struct, frozen=True):
    """The document pyproject.toml."""

    tool: Tools = Tools()


@dataclass(frozen=True)
class Growth:
    """How much a model may grow over its baseline; if there are two limits, the smaller one counts.

    Attributes:
        relative: share of the baseline's bytes.
        absolute: bytes.
    """

    relative: Fraction | None
    absolute: int | None

    def allowed(self, baseline: int) -> int:
        """Return the bytes that may be added to ``baseline``, rounded down."""
        limits = []
        if self.relative is not None:
            limits.append(floor(self.relative * baseline))
        if self.absolute is not None:
            limits.append(self.absolute)
        return min(limits)

    def __str__(self) -> str:
        relative = "" if self.relative is None else f"{float(100 * self.relative):g}%"
        absolute = "" if self.absolute is None else format_bytes(self.absolute)
        return " or ".join(part for part in (relative, absolute) if part)


@dataclass(frozen=True)
class Entry:
    """One thing to check.

    Attributes:
        name: what results and baseline call it.
        path: a path below the configuration's directory, or a pattern for such paths.
        is_glob: whether ``path`` is a pattern; every match is checked.
        max_bytes: limit for all files together.
        max_growth: limit for what is added to the baseline.
        min_recovery: share of the dense model's quality that must be left; 1 is all of it.
        max_load_time_ratio: limit for the load time over the baseline's.
        missing: what to do when the path is not there, or the pattern matches nothing.
    """

    name: str
    path: str
    is_glob: bool = False
    max_bytes: int | None = None
    max_growth: Growth | None = None
    min_recovery: float | None = None
    max_load_time_ratio: float | None = None
    missing: Missing = "fail"


@dataclass(frozen=True)
class Config:
    """All entries, and the file that they were read from; paths are relative to its directory."""

    file: Path
    entries: tuple[Entry, ...]

    @property
    def root(self) -> Path:
        return self.file.parent

    @property
    def lock(self) -> Path:
        return self.root / LOCK_FILE


def find_config(directory: Path) -> Path:
    """Return the file that configures the check in a directory.

    Raises:
        UsageError: there is none, or there are two.
    """
    own, project = directory / CONFIG_FILE, directory / "pyproject.toml"
    in_project = project.is_file() and _section(project) is not None
    if own.is_file() and in_project:
        raise UsageError(f"both {own} and {project} configure the check; keep one of them")
    if own.is_file():
        return own
    if in_project:
        return project
    raise UsageError(f"nothing to check: there is no {own}. Write one, for example:\n\n{_EXAMPLE}")


def _refuse_export(name: str) -> str:
    raise UsageError(f"export {name!r} is of a project file, which is not read here; name its path")


def load_config(file: Path, place_of: PlaceOf = _refuse_export) -> Config:
    """Read and check a configuration.

    Args:
        file: the file to read.
        place_of: says where an export of the project file is written; the default refuses entries that name one.

    Raises:
        UsageError: unreadable, unknown keys, wrong types, limits that contradict each other or are no limits.
    """
    in_project = file.name == "pyproject.toml"
    document = {"check": _section(file)} if in_project else read_toml(file, UsageError)
    raw = document.get("check")
    if not raw or not isinstance(raw, dict | list):
        raise UsageError(f"{file} has no [[check]] entries. Write one, for example:\n\n{_EXAMPLE}")
    document["check"] = raw if isinstance(raw, list) else [raw]
    tables = convert(document, CheckFile, str(file), _expected).check
    entries = tuple(_entry(table, f"{file}: $.check[{index}]", place_of) for index, table in enumerate(tables))
    for attribute in ("name", "path"):
        values = [getattr(entry, attribute) for entry in entries]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UsageError(f"{file} has two entries with the {attribute} {twice[0]!r}; their limits could contradict")
    return Config(file, entries)


def _section(project: Path) -> Any:
    """Return ``[tool.acip-export.check]`` of a pyproject.toml; ``None`` if it is not there."""
    document = convert(read_toml(project, UsageError), Project, str(project), UsageError)
    return document.tool.acip_export.check


def _expected(message: str) -> UsageError:
    return UsageError(f"{message}; an entry has the keys {', '.join(EntryTable.__struct_fields__)}, see docs/check.md")


def _entry(table: EntryTable, where: str, place_of: PlaceOf) -> Entry:
    if sum(each is not None for each in (table.path, table.glob, table.export)) != 1:
        raise UsageError(f"{where} needs one of path, glob and export")
    path = table.path or table.glob or place_of(table.export or "")
    parts = Path(path).parts
    if not all(text.isprintable() for text in (path, table.name or "")):
        raise UsageError(f"{where}: path and name must be printable, they are {path!r} and {table.name!r}")
    if (table.glob and not parts) or Path(path).is_absolute() or ".." in parts:
        raise UsageError(f"{where}: {path} must lie below the configuration's directory")
    if any("**" in part and part != "**" for part in parts):
        raise UsageError(f"{where}: ** stands for directories and must be alone between slashes: {path}")
    if parts.count("**") > 1:
        raise UsageError(f"{where}: {path} has ** more than once; one stands for any number of directories")
    if any(len(part.encode()) > LONGEST_FILE_NAME for part in parts):
        raise UsageError(f"{where}: {path} has a name of more than {LONGEST_FILE_NAME} bytes, which no file has")
    if all(getattr(table, limit) is None for limit in _LIMITS):
        raise UsageError(f"{where} has no limit, so nothing could fail; give one of: {', '.join(_LIMITS)}")
    return Entry(
        name=table.name or table.export or path,
        path=path,
        is_glob=table.glob is not None,
        max_bytes=None if table.max_bytes is None else _bytes(table.max_bytes, f"{where}.max_bytes"),
        max_growth=None if table.max_growth is None else _growth(table.max_growth, f"{where}.max_growth"),
        min_recovery=None if table.min_recovery is None else _recovery(table.min_recovery, f"{where}.min_recovery"),
        max_load_time_ratio=table.max_load_time_ratio,
        missing=table.missing,
    )


def _bytes(value: Number | str, what: str) -> int:
    if not isinstance(value, str):
        raise UsageError(f'{what} is {value!r}; write it with its unit, for example "900MB"')
    return parse_bytes(value, what)


def _growth(value: Number | str | tuple[str, ...], what: str) -> Growth:
    parts = value if isinstance(value, tuple) else (value,)
    relative: list[Fraction] = []
    absolute: list[int] = []
    for part in parts:
        match = _PERCENT.fullmatch(part.strip()) if isinstance(part, str) else None
        if match:
            relative.append(Fraction(match[1]) / 100)
        else:
            absolute.append(_bytes(part, what))
    if not parts or len(relative) > 1 or len(absolute) > 1:
        raise UsageError(f'{what} is {value!r}; give a percentage, bytes, or one of each: ["1%", "5MB"]')
    return Growth(relative[0] if relative else None, absolute[0] if absolute else None)


def _recovery(value: Number | str, what: str) -> float:
    share = value
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        share = float(match[1]) / 100
    if isinstance(share, str) or not 0 < share <= 1:
        raise UsageError(f'{what} is {value!r}; expected a share of the dense model\'s quality, 0.95 or "95%"')
    return float(share)
