"""The check itself: find what the configuration names, take snapshots, fetch the baseline, compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from acip_export.artifacts.document import header_of
from acip_export.artifacts.names import LOCK, REPORT, REPORT_FILE
from acip_export.artifacts.report import find_report
from acip_export.check.compare import Result, evaluate, missing, same_sizes, unreadable, without_baseline_limits
from acip_export.check.config import Config, Entry
from acip_export.check.lock import LOCK_KIND, decode_lock, load_lock, save_lock
from acip_export.check.quality import read_quality
from acip_export.check.snapshot import FileRecord, Snapshot, take_snapshot, with_hashes
from acip_export.errors import BaselineError, BaselineVersionError, InputError, VerificationError
from acip_export.io.inputs import read_input
from acip_export.io.outputs import claim_output


@dataclass(frozen=True)
class Baseline:
    """Snapshots by entry name, and where they are kept."""

    source: str
    snapshots: Mapping[str, Snapshot]


@dataclass(frozen=True)
class Outcome:
    """All verdicts, in the configuration's order. ``config``: the file that asked for them."""

    config: str
    source: str
    results: tuple[Result, ...]
    updated: bool = False

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def passed(self) -> bool:
        return not self.failed


def run_check(config: Config, against: Path | None = None) -> Outcome:
    """Check every entry against its limits, and the lock file or ``against``.

    Raises:
        BaselineError, ModelFileError: the baseline cannot be read. An unreadable model is a failed entry instead.
    """
    baseline = _locked(config) if against is None else read_against(against, config)
    results = [_check(config, entry, baseline) for entry in expand(config, baseline)]
    return Outcome(str(config.file), baseline.source, tuple(results))


def update_lock(config: Config) -> Outcome:
    """Write the lock file from what is there, then check the limits that need no baseline.

    An entry that is missing and may be keeps the baseline that it had.

    Raises:
        VerificationError: a model is missing or unreadable; the lock file is as it was.
        BaselineVersionError: the old lock file is of an unknown version.
        UsageError: what is there is no lock file, or one of the files that are read.
    """
    claim_output(config.lock, LOCK_KIND, True, files_read(config), config.root)
    old = _old_baseline(config)
    entries = list(expand(config, Baseline(config.lock.name, {})))
    snapshots: dict[str, Snapshot] = {}
    results = []
    for entry in entries:
        model = config.root / entry.path
        if entry.is_glob or not model.exists():
            if entry.missing == "skip":
                snapshots |= {
                    name: snapshot
                    for name, snapshot in old.snapshots.items()
                    if name == entry.name or (entry.is_glob and name.startswith(f"{entry.name}: "))
                }
            results.append(missing(entry, _absence(entry)))
            continue
        try:
            now, problem = _with_quality(take_snapshot(model, entry.path), model)
        except InputError as error:
            results.append(unreadable(entry, str(error)))
            continue
        snapshots[entry.name] = now = with_hashes(now, model)
        relaxed = without_baseline_limits(entry)
        results.append(evaluate(relaxed, now, old.snapshots.get(entry.name), old.source, problem))
    outcome = Outcome(str(config.file), old.source, tuple(results), updated=True)
    gone = [result for result in outcome.failed if result.total_bytes is None]
    if gone:
        lines = "\n".join(f"  {result.name}: {result.problems[0].message}" for result in gone)
        raise VerificationError(f"{config.lock} was not written:\n{lines}")
    save_lock(snapshots, config.lock)
    return outcome


def files_read(config: Config) -> list[Path]:
    """The configuration and the models that it names; patterns may match anything, and are left out."""
    return [config.file, *(config.root / entry.path for entry in config.entries if not entry.is_glob)]


def expand(config: Config, baseline: Baseline) -> Iterator[Entry]:
    """Entries with every pattern replaced by its matches, and by what it matched in the baseline.

    A pattern without any match stays as it is.
    """
    for entry in config.entries:
        if not entry.is_glob:
            yield entry
            continue
        found = {path.relative_to(config.root).as_posix() for path in config.root.glob(entry.path)}
        prefix = f"{entry.name}: "
        found |= {name.removeprefix(prefix) for name in baseline.snapshots if name.startswith(prefix)}
        for path in sorted(found):
            yield replace(entry, name=prefix + path, path=path, is_glob=False)
        if not found:
            yield entry


def _check(config: Config, entry: Entry, baseline: Baseline) -> Result:
    model = config.root / entry.path
    if entry.is_glob or not model.exists():
        return missing(entry, _absence(entry))
    before = baseline.snapshots.get(entry.name)
    try:
        now, problem = _with_quality(take_snapshot(model, entry.path), model)
        # Contents are read only where nothing cheaper tells the two apart.
        if before is not None and same_sizes(now, before) and all(file.sha256 for file in before.files.values()):
            now = with_hashes(now, model)
    except InputError as error:
        return unreadable(entry, str(error))
    return evaluate(entry, now, before, baseline.source, problem)


def _absence(entry: Entry) -> str:
    return f"nothing matches {entry.path}" if entry.is_glob else f"{entry.path} does not exist"


def _with_quality(snapshot: Snapshot, model: Path) -> tuple[Snapshot, str]:
    """The snapshot with its report's figures, or why there are none."""
    report = find_report(model)
    if report is None:
        return snapshot, f"{snapshot.path} has no {REPORT_FILE}"
    try:
        quality = read_quality(report)
    except InputError as error:
        return snapshot, str(error)
    if quality.written_bytes != snapshot.total_bytes:
        return snapshot, (
            f"{report} is of files of {quality.written_bytes:,} bytes, and there are {snapshot.total_bytes:,} now"
        )
    return replace(snapshot, quality=quality), ""


def _locked(config: Config) -> Baseline:
    """The first run has no lock file; entries that need one say so."""
    return Baseline(config.lock.name, load_lock(config.lock) if config.lock.exists() else {})


def _old_baseline(config: Config) -> Baseline:
    """A damaged lock file may be replaced, as after a merge conflict; one of another version may not."""
    try:
        return _locked(config)
    except BaselineVersionError:
        raise
    except BaselineError:
        return Baseline(config.lock.name, {})


def read_against(path: Path, config: Config) -> Baseline:
    """A baseline from elsewhere: a lock file, a report, a directory with the same paths, or, for one entry, its model.

    Raises:
        BaselineError: missing, or none of these. ModelFileError: a model in it is damaged.
    """
    if not path.exists():
        raise BaselineError(
            f"{path} does not exist; --against takes a lock file, a report.json, a directory or a model"
        )
    if path.is_dir():
        baseline = Baseline(str(path), {entry.name: take for entry, take in _below(path, config)})
        if baseline.snapshots:
            return baseline
    elif path.suffix == ".json":
        known = _from_json(path, config)
        if known is not None:
            return Baseline(str(path), known)
    return Baseline(str(path), {_only(config, path).name: _model_snapshot(path, _only(config, path).path)})


def _below(directory: Path, config: Config) -> Iterator[tuple[Entry, Snapshot]]:
    """Models at the configuration's own paths below another directory."""
    for entry in expand(replace(config, file=directory / config.file.name), Baseline("", {})):
        model = directory / entry.path
        if not entry.is_glob and model.exists():
            yield entry, _model_snapshot(model, entry.path)


def _model_snapshot(model: Path, path: str) -> Snapshot:
    return _with_quality(take_snapshot(model, path), model)[0]


def _from_json(path: Path, config: Config) -> dict[str, Snapshot] | None:
    """A lock file's or a report's contents; ``None`` for other JSON, which may be a plan."""
    data = read_input(path, BaselineError)
    found = header_of(data, str(path), BaselineError).artifact
    if found == LOCK.artifact:
        return decode_lock(data, path)
    if found == REPORT.artifact:
        quality = read_quality(path)
        entry = _only(config, path)
        return {entry.name: Snapshot(entry.path, "", "", {"": FileRecord(quality.written_bytes)}, {}, quality)}
    return None


def _only(config: Config, path: Path) -> Entry:
    if len(config.entries) != 1 or config.entries[0].is_glob:
        names = ", ".join(entry.name for entry in config.entries)
        raise BaselineError(
            f"{path} holds nothing at the configuration's paths, and as a single model it cannot stand for: {names}.\n"
            "Give a directory with the same paths, or a lock file"
        )
    return config.entries[0]
