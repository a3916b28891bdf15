"""Quantities as people write and read them: most of them bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from acip_export.errors import UsageError

_FACTORS = {
    f"{prefix}{binary}": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "I")
}
_MOST_STEPS = 64
# From here on an error is told as a factor: less by a half is not as far off as more by a half.
_SHARE = 0.35
# Digits of a text that is a quantity, and bytes that files, memory and JSON's whole numbers can have.
_LONGEST, _MOST = 40, 2**63 - 1
_QUANTITY = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)")


def parse_bytes(text: str, what: str = "budget", whole: Callable[[], int] | None = None) -> int:
    """Read ``"4GB"`` or ``"4G"`` (4*10^9), ``"4GiB"`` (4*2^30) or ``"50%"`` (of ``whole``) as bytes, rounded down.

    Raises:
        UsageError: no unit, an unknown unit, zero or negative, not a number, or per cent where there is no whole.
    """
    match = _QUANTITY.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or (match[3] == "%" and whole is None):
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
        raise UsageError(f"{what} {text!r} is not a quantity of bytes; write for example 4GB, 900MB or 2GiB")
    sign, number, unit = match.groups()
    if not unit:
        example = number if float(number) else "900"
        raise UsageError(f"{what} {text!r} has no unit; write for example {example}MB, {example}GB or {example}GiB")
    if unit == "%" and whole is not None:
        factor = Fraction(whole(), 100)
    elif unit.upper() == "B":
        factor = Fraction(1)
    elif (prefix := unit.upper().removesuffix("B")) in _FACTORS:
        factor = Fraction(_FACTORS[prefix])
    else:
        raise UsageError(f"{what} {text!r} has the unknown unit {unit!r}; known: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB")
    value = int(Fraction(number) * factor)
    if sign == "-" or value == 0:
        raise UsageError(f"{what} {text!r} must be more than zero bytes")
    if value > _MOST:
        raise UsageError(f"{what} {text!r} is more than any file or memory has ({_MOST:,} bytes)")
    return value


def parse_context(text: str) -> int | Literal["max"]:
    """Read ``"8192"``, ``"8k"`` (1024 each) or ``"max"`` as tokens.

    Raises:
        UsageError: none of these.
    """
    if text.strip().lower() == "max":
        return "max"
    match = re.fullmatch(r"([+-]?\d+)\s*(k?)", text.strip().lower())
    if match is None:
        raise UsageError(f"--context {text!r} is no number of tokens; write for example 8192, 8k or max")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_budgets(texts: Sequence[str], whole: Callable[[], int]) -> tuple[int, ...]:
    """Read budgets and ladders of them: ``1GB..4GB:5`` is five budgets at equal factors, the two included.

    Raises:
        UsageError: as :func:`parse_bytes`; a ladder that does not rise, or has no two steps; a budget that comes twice.
    """
    budgets: list[int] = []
    for text in texts:
        if ".." not in text:
            budgets.append(parse_bytes(text, whole=whole))
            continue
        ladder = re.fullmatch(r"(.+?)\.\.(.+):(\d+)", text.strip())
        if ladder is None:
            raise UsageError(f"budget {text!r} is no ladder; write for example 1GB..4GB:5")
        first, last, count = parse_bytes(ladder[1], whole=whole), parse_bytes(ladder[2], whole=whole), int(ladder[3])
        if not 2 <= count <= _MOST_STEPS or first >= last:
            raise UsageError(f"budget {text!r} must rise, in 2 to {_MOST_STEPS} steps; write for example 1GB..4GB:5")
        inner = [round(first * (last / first) ** (step / (count - 1))) for step in range(1, count - 1)]
        budgets += [first, *inner, last]
    named = Counter(map(size_name, budgets))
    for name, times in named.items():
        if times > 1:
            raise UsageError(f"{times} budgets are {name}; each needs a directory of its own")
    return tuple(budgets)


def parse_seconds(text: str, what: str = "time") -> float:
    """Read ``"20min"``, ``"2h"`` or ``"90s"`` as seconds.

    Raises:
        UsageError: no unit, an unknown unit, zero or negative, or not a number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text.strip()[:_LONGEST])
    seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise UsageError(f"{what} {text!r} is no time; write for example 20min, 90s or 2h")
    return seconds


def format_bytes(count: int) -> str:
    """Decimal units, three significant digits: ``3.97 MB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= factor:
            value = count / factor
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{count} B"


def format_nats(divergence: float) -> str:
    """Three significant digits, never a zero that is none: ``0.0188``, ``4.31e-06``."""
    return f"{divergence:.3g}"


def format_speed(tokens: float, error: float | None = None) -> str:
    """Say tokens a second, and how far off they may be: ``6.13``, ``1,234 ± 25%``, ``0.42 within a factor of 2.0``."""
    shown = f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"
    return f"{shown} {format_error(error)}".rstrip()


def format_error(share: float | None) -> str:
    """Say how far off a prediction may be: ``± 25%``, ``within a factor of 2.5``; nothing, where that is not known.

    Args:
        share: less one, the factor that predictions and what comes are within, either way.
    """
    if share is None:
        return ""
    if share < _SHARE:
        return f"± {share:.0%}"
    return f"within a factor of {1 + share:.{0 if share >= 9 else 1}f}"


def size_name(count: int) -> str:
    """Put a size into a file's name, as it would be typed: ``150MB``, ``1.5GB``."""
    number, unit = format_bytes(count).split()
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit


def format_seconds(seconds: float) -> str:
    """As people say it: ``40 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def ceil_div(count: int, size: int) -> int:
    """Divide and round up."""
    return -(-count // size)
