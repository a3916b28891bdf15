"""What is to be checked: ``acip-check.toml``, or ``[tool.acip-export.check]`` of pyproject.toml. See docs/check.md."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, Literal

from acip_export.errors import UsageError
from acip_export.units import format_bytes, parse_bytes

CONFIG_FILE = "acip-check.toml"
LOCK_FILE = "acip-check.lock.json"

Missing = Literal["fail", "skip"]

KEYS = ("name", "path", "glob", "max_bytes", "max_growth", "min_recovery", "max_load_time_ratio", "missing")
_LIMITS = ("max_bytes", "max_growth", "min_recovery", "max_load_time_ratio")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_EXAMPLE = """[[check]]
name = "phone"
path = "export/gguf"
max_bytes = "900MB"
max_growth = ["1%", "5MB"]
min_recovery = 0.95"""


@dataclass(frozen=True)
class Growth:
    """Growth that is allowed over the baseline; of the two limits the one that is hit first counts.

    Attributes:
        relative: share of the baseline's bytes. absolute: bytes.
    """

    relative: Fraction | None
    absolute: int | None

    def allowed(self, baseline: int) -> int:
        """Bytes, rounded down."""
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
        path: below the configuration's directory; a pattern where ``is_glob``, and then every match is checked.
        max_bytes: of all files together. max_growth: over the baseline.
        min_recovery: quality kept of the dense model's, 1 is all of it.
        max_load_time_ratio: load time over the baseline's.
        missing: what it means when the path is not there, or the pattern matches nothing.
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
    """``file``: where it was read from; paths are relative to its directory, and the lock file lies there."""

    file: Path
    entries: tuple[Entry, ...]

    @property
    def root(self) -> Path:
        return self.file.parent

    @property
    def lock(self) -> Path:
        return self.root / LOCK_FILE


def find_config(directory: Path) -> Path:
    """The configuration of a directory.

    Raises:
        UsageError: there is none, or there are two.
    """
    own, project = directory / CONFIG_FILE, directory / "pyproject.toml"
    in_project = project.is_file() and _section(_read_toml(project)) is not None
    if own.is_file() and in_project:
        raise UsageError(f"both {own} and {project} configure the check; keep one of them")
    if own.is_file():
        return own
    if in_project:
        return project
    raise UsageError(f"nothing to check: there is no {own}. Write one, for example:\n\n{_EXAMPLE}")


def load_config(file: Path) -> Config:
    """Read and check a configuration.

    Raises:
        UsageError: unreadable, unknown keys, wrong types, limits that contradict each other or are no limits.
    """
    document = _read_toml(file)
    raw = _section(document) if file.name == "pyproject.toml" else document.get("check")
    if isinstance(raw, dict):
        raw = [raw]
    if not isinstance(raw, list) or not raw or not all(isinstance(item, dict) for item in raw):
        raise UsageError(f"{file} has no [[check]] entries. Write one, for example:\n\n{_EXAMPLE}")
    if file.name != "pyproject.toml" and set(document) != {"check"}:
        unknown = ", ".join(sorted(set(document) - {"check"}))
        raise UsageError(f"{file} has the unknown key {unknown}; it holds [[check]] entries only")
    entries = tuple(_entry(item, f"{file}, entry {number}") for number, item in enumerate(raw, 1))
    for attribute in ("name", "path"):
        values = [getattr(entry, attribute) for entry in entries]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UsageError(f"{file} has two entries with the {attribute} {twice[0]!r}; their limits could contradict")
    return Config(file, entries)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read as TOML: {error}") from error


def _section(document: Mapping[str, Any]) -> Any:
    tool = document.get("tool", {})
    return tool.get("acip-export", {}).get("check") if isinstance(tool, dict) else None


def _entry(raw: Mapping[str, Any], where: str) -> Entry:
    unknown = sorted(set(raw) - set(KEYS))
    if unknown:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    for key in ("name", "path", "glob"):
        if key in raw and (not isinstance(raw[key], str) or not raw[key] or not raw[key].isprintable()):
            raise UsageError(f"{where}: {key} must be a text, it is {raw[key]!r}")
    if ("path" in raw) == ("glob" in raw):
        raise UsageError(f"{where} needs a path or a glob, and not both")
    path = raw.get("path") or raw["glob"]
    parts = Path(path).parts
    if Path(path).is_absolute() or ".." in parts:
        raise UsageError(f"{where}: {path} must lie below the configuration's directory")
    if any("**" in part and part != "**" for part in parts):
        raise UsageError(f"{where}: ** stands for directories and must be alone between slashes: {path}")
    if not any(limit in raw for limit in _LIMITS):
        raise UsageError(f"{where} has no limit, so nothing could fail; give one of: {', '.join(_LIMITS)}")
    missing = raw.get("missing", "fail")
    if missing not in ("fail", "skip"):
        raise UsageError(f'{where}: missing is {missing!r}, expected "fail" or "skip"')
    return Entry(
        name=raw.get("name", path),
        path=path,
        is_glob="glob" in raw,
        max_bytes=_bytes(raw["max_bytes"], f"{where}: max_bytes") if "max_bytes" in raw else None,
        max_growth=_growth(raw["max_growth"], f"{where}: max_growth") if "max_growth" in raw else None,
        min_recovery=_recovery(raw["min_recovery"], f"{where}: min_recovery") if "min_recovery" in raw else None,
        max_load_time_ratio=_ratio(raw["max_load_time_ratio"], where) if "max_load_time_ratio" in raw else None,
        missing=missing,
    )


def _bytes(value: object, what: str) -> int:
    if not isinstance(value, str):
        raise UsageError(f'{what} is {value!r}; write it with its unit, for example "900MB"')
    return parse_bytes(value, what)


def _growth(value: object, what: str) -> Growth:
    parts = value if isinstance(value, list) else [value]
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


def _recovery(value: object, what: str) -> float:
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        value = float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(f'{what} is {value!r}; expected a share of the dense model\'s quality, 0.95 or "95%"')
    return float(value)


def _ratio(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UsageError(f"{where}: max_load_time_ratio is {value!r}; expected a number such as 1.5")
    return float(value)
