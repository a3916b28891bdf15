"""A model against its limits and its baseline. Pure: snapshots in, verdict out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Literal

from acip_export.check.config import Entry, Growth
from acip_export.check.snapshot import Snapshot
from acip_export.inspection.diff import REST, Stored, TensorChange, diff_tensors
from acip_export.units import format_bytes

Status = Literal["ok", "failed", "skipped"]
Rule = Literal["max_bytes", "max_growth", "min_recovery", "max_load_time_ratio", "missing", "unreadable"]

UPDATE = "run  acip-export check --update  and commit the lock file"

# Tensors that a message names; the outputs list all of them.
_NAMED = 3
# Without a growth limit of its own, an entry that shrinks by more than this is worth a word.
_WORTH_A_WORD = Growth(Fraction(1, 100), None)
# Seconds that loading may always take longer: small exports load within the noise of a shared machine.
_LOAD_NOISE = 0.5


@dataclass(frozen=True)
class Problem:
    """Why an entry failed.

    Attributes:
        rule: the limit that was broken, or what kept it from being checked.
        message: what was found, what was allowed, what to do.
        broken: the check could not be made at all.
    """

    rule: Rule
    message: str
    broken: bool = False


@dataclass(frozen=True)
class Result:
    """The verdict on one entry.

    Attributes:
        total_bytes, baseline_bytes: ``None`` where there is no model or no baseline.
        limit_bytes: the smaller of ``max_bytes`` and the baseline with its growth.
        recovery: as measured. changes: tensors, largest change first; the bytes around them are a row of their own.
        identical: all contents are the baseline's, by their hashes.
    """

    name: str
    path: str
    status: Status
    total_bytes: int | None = None
    baseline_bytes: int | None = None
    limit_bytes: int | None = None
    recovery: float | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[TensorChange, ...] = ()
    identical: bool = False

    @property
    def delta(self) -> int | None:
        return (
            None if self.total_bytes is None or self.baseline_bytes is None else self.total_bytes - self.baseline_bytes
        )

    @property
    def change(self) -> str:
        """In words, for a table; empty where there is nothing to compare."""
        if self.delta is None or self.identical:
            return "identical" if self.identical else ""
        return signed(self.delta, self.baseline_bytes) if self.delta else "same size"


def evaluate(entry: Entry, now: Snapshot, baseline: Snapshot | None, source: str, quality_problem: str = "") -> Result:
    """Hold a model against its limits.

    Args:
        baseline: what it is compared with. source: where that is kept, for messages.
        quality_problem: why ``now.quality`` is not known, where that has a reason.
    """
    comparable = baseline is not None and not _other_model(now, baseline)
    against = baseline if comparable else None
    changes = () if against is None else _changes(now, against)
    problems = [
        *_size(entry, now),
        *_growth(entry, now, baseline, source, changes),
        *_recovery(entry, now, quality_problem),
        *_load_time(entry, now, against, source, quality_problem),
    ]
    return Result(
        name=entry.name,
        path=entry.path,
        status="failed" if problems else "ok",
        total_bytes=now.total_bytes,
        baseline_bytes=None if against is None else against.total_bytes,
        limit_bytes=_limit(entry, against),
        recovery=None if now.quality is None else now.quality.recovery,
        problems=tuple(problems),
        notes=tuple(_notes(entry, now, against)),
        changes=changes,
        identical=against is not None and _identical(now, against),
    )


def missing(entry: Entry, message: str) -> Result:
    """The verdict on what is not there."""
    if entry.missing == "skip":
        return Result(entry.name, entry.path, "skipped", notes=(f"{message}; skipped, as configured",))
    problem = Problem("missing", f'{message}; export it first, or set  missing = "skip"', broken=True)
    return Result(entry.name, entry.path, "failed", problems=(problem,))


def unreadable(entry: Entry, message: str) -> Result:
    """The verdict on what cannot be read: a check that cannot be made is a failure."""
    return Result(entry.name, entry.path, "failed", problems=(Problem("unreadable", message, broken=True),))


def without_baseline_limits(entry: Entry) -> Entry:
    """What is left to check when the baseline is written anew."""
    return replace(entry, max_growth=None, max_load_time_ratio=None)


def signed(delta: int, base: int | None = None) -> str:
    """``+70.0 kB (+1.8 %)``."""
    sign = "+" if delta >= 0 else "-"
    text = f"{sign}{format_bytes(abs(delta))}"
    return text if not base else f"{text} ({delta / base:+.2%})"


def same_sizes(now: Snapshot, baseline: Snapshot) -> bool:
    """Whether only the contents could differ."""
    return now.tensors == baseline.tensors and {name: f.nbytes for name, f in now.files.items()} == {
        name: f.nbytes for name, f in baseline.files.items()
    }


def _identical(now: Snapshot, baseline: Snapshot) -> bool:
    return now.files == baseline.files and all(file.sha256 for file in now.files.values())


def _other_model(now: Snapshot, baseline: Snapshot) -> str:
    """Why a comparison would say nothing, or ``""``."""
    if now.architecture and baseline.architecture and now.architecture != baseline.architecture:
        return f"architecture {baseline.architecture}, now {now.architecture}"
    if baseline.tensors and now.tensors and not set(baseline.tensors) & set(now.tensors):
        return "no tensor has a name that is there now"
    return ""


def _changes(now: Snapshot, baseline: Snapshot) -> tuple[TensorChange, ...]:
    """Nothing is known of the tensors of a baseline that has only sizes."""
    if not baseline.tensors:
        return ()
    rest = [Stored("", (), snapshot.overhead_bytes) for snapshot in (baseline, now)]
    return diff_tensors({**baseline.tensors, REST: rest[0]}, {**now.tensors, REST: rest[1]})


def _limit(entry: Entry, baseline: Snapshot | None) -> int | None:
    limits = [] if entry.max_bytes is None else [entry.max_bytes]
    if entry.max_growth is not None and baseline is not None:
        limits.append(baseline.total_bytes + entry.max_growth.allowed(baseline.total_bytes))
    return min(limits, default=None)


def _size(entry: Entry, now: Snapshot) -> list[Problem]:
    if entry.max_bytes is None or now.total_bytes <= entry.max_bytes:
        return []
    over = now.total_bytes - entry.max_bytes
    message = f"{now.total_bytes:,} bytes, {entry.max_bytes:,} allowed: {format_bytes(over)} too many"
    return [Problem("max_bytes", message)]


def _growth(
    entry: Entry, now: Snapshot, baseline: Snapshot | None, source: str, changes: tuple[TensorChange, ...]
) -> list[Problem]:
    if entry.max_growth is None:
        return []
    if baseline is None:
        return [Problem("max_growth", f"{source} has no baseline of {entry.name!r}; {UPDATE}", broken=True)]
    other = _other_model(now, baseline)
    if other:
        message = f"the baseline in {source} is of another model ({other}); if that is meant, {UPDATE}"
        return [Problem("max_growth", message, broken=True)]
    delta = now.total_bytes - baseline.total_bytes
    allowed = entry.max_growth.allowed(baseline.total_bytes)
    if delta <= allowed:
        return []
    message = (
        f"grew by {signed(delta, baseline.total_bytes)} to {now.total_bytes:,} bytes, at most {format_bytes(allowed)} "
        f"allowed ({entry.max_growth}) over the baseline of {baseline.total_bytes:,}{_grown(changes)}; "
        f"if that is meant, {UPDATE}"
    )
    return [Problem("max_growth", message)]


def _grown(changes: tuple[TensorChange, ...]) -> str:
    grown = [change for change in changes if change.delta > 0]
    if not grown:
        return ""
    named = ", ".join(f"{change.name} {signed(change.delta)} {_how(change)}".rstrip() for change in grown[:_NAMED])
    more = f" and {len(grown) - _NAMED} more" if len(grown) > _NAMED else ""
    return f". Grown: {named}{more}"


def _how(change: TensorChange) -> str:
    return "" if change.name == REST else f"({change.what})"


def _recovery(entry: Entry, now: Snapshot, quality_problem: str) -> list[Problem]:
    if entry.min_recovery is None:
        return []
    if now.quality is None or now.quality.recovery is None:
        why = quality_problem or "its report has neither perplexity against the dense model nor similarity"
        message = f"quality cannot be checked: {why}; run  acip-export verify EXPORT --text TEXT  and keep report.json"
        return [Problem("min_recovery", message, broken=True)]
    if now.quality.recovery >= entry.min_recovery:
        return []
    message = (
        f"keeps {now.quality.recovery:.2%} of the dense model's quality ({now.quality.measure}), "
        f"{entry.min_recovery:.2%} required"
    )
    return [Problem("min_recovery", message)]


def _load_time(
    entry: Entry, now: Snapshot, baseline: Snapshot | None, source: str, quality_problem: str
) -> list[Problem]:
    if entry.max_load_time_ratio is None:
        return []
    before = None if baseline is None or baseline.quality is None else baseline.quality.load_seconds
    after = None if now.quality is None else now.quality.load_seconds
    if before is None or after is None:
        why = f"{source} has none for it" if after is not None else quality_problem or "its report has none"
        message = f"load time cannot be compared: {why}; run  acip-export verify, then {UPDATE}"
        return [Problem("max_load_time_ratio", message, broken=True)]
    if after <= max(before * entry.max_load_time_ratio, before + _LOAD_NOISE):
        return []
    message = (
        f"loads in {after:.2f} s, {after / before:.2f} times the baseline's {before:.2f} s; "
        f"{entry.max_load_time_ratio:g} times allowed"
    )
    return [Problem("max_load_time_ratio", message)]


def _notes(entry: Entry, now: Snapshot, baseline: Snapshot | None) -> list[str]:
    """Shrinkage that a loose baseline would let grow back unseen."""
    if baseline is None:
        return []
    shrunk = baseline.total_bytes - now.total_bytes
    if shrunk <= (entry.max_growth or _WORTH_A_WORD).allowed(baseline.total_bytes):
        return []
    notes = [f"shrank by {signed(-shrunk, baseline.total_bytes)}: tighten the baseline, {UPDATE}"]
    if entry.max_bytes is not None:
        room = Fraction(entry.max_bytes, max(baseline.total_bytes, 1))
        tight = min(entry.max_bytes, ceil(now.total_bytes * max(room, Fraction(1))))
        notes.append(f'max_bytes could be "{tight}B" instead of "{entry.max_bytes}B" with the same room as before')
    return notes
