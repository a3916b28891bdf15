"""``acip-check.lock.json``: the committed baseline. Normative description: docs/check.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acip_export.check.quality import Quality
from acip_export.check.snapshot import FileRecord, Snapshot
from acip_export.errors import BaselineError, BaselineVersionError
from acip_export.inspection.diff import Stored
from acip_export.io.outputs import FileKind, claim_output

LOCK_ARTIFACT = "acip-check-lock"
LOCK_VERSION = 2
# After a merge conflict it may be no JSON any more; it is written anew then.
LOCK_KIND = FileKind("a baseline", re.compile(rb'<{7} |\s*\{(\s*[<|=>]{7}.*\n)?\s*"artifact"\s*:\s*"acip-check-lock"'))


def save_lock(snapshots: Mapping[str, Snapshot], file: Path) -> None:
    """Write atomically; equal snapshots give equal bytes."""
    with claim_output(file, LOCK_KIND, True, base=file.parent).new_file() as temporary:
        temporary.write_text(dumps_lock(snapshots), encoding="utf-8")


def dumps_lock(snapshots: Mapping[str, Snapshot]) -> str:
    """One line a tensor, so that a diff of the lock file reads as a diff of the model."""
    entries = []
    for name, snapshot in sorted(snapshots.items()):
        head = {
            "path": snapshot.path,
            "kind": snapshot.kind,
            "architecture": snapshot.architecture,
            "total_bytes": snapshot.total_bytes,
            "files": {
                name: {"bytes": record.nbytes, "sha256": record.sha256} for name, record in snapshot.files.items()
            },
            "quality": None if snapshot.quality is None else asdict(snapshot.quality),
        }
        lines = [f'   "{key}": {_dump(value)}' for key, value in head.items()]
        tensors = [f"    {_dump(key)}: {_dump([t.type, t.shape, t.nbytes])}" for key, t in snapshot.tensors.items()]
        lines.append('   "tensors": {' + ("\n" + ",\n".join(tensors) + "\n   }" if tensors else "}"))
        entries.append(f"  {_dump(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    body = "{\n" + ",\n".join(entries) + "\n }" if entries else "{}"
    return f'{{\n "artifact": "{LOCK_ARTIFACT}",\n "version": {LOCK_VERSION},\n "entries": {body}\n}}\n'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def load_lock(file: Path) -> dict[str, Snapshot]:
    """Read and check a lock file.

    Raises:
        BaselineError: unreadable or edited by hand. BaselineVersionError: of an unknown version.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaselineError(f"{file} does not exist; make it with  acip-export check --update  and commit it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaselineError(
            f"{file} is no JSON: {error}\nAfter a merge conflict write it anew:  acip-export check --update"
        ) from error
    return parse_lock(data, file)


def parse_lock(data: Any, file: Path) -> dict[str, Snapshot]:
    """The snapshots of parsed JSON. Raises BaselineError as :func:`load_lock`."""
    if not isinstance(data, dict) or data.get("artifact") != LOCK_ARTIFACT:
        raise BaselineError(f"{file} is no baseline: its artifact is not {LOCK_ARTIFACT}")
    if data.get("version") != LOCK_VERSION:
        raise BaselineVersionError(
            f"{file} is a baseline of version {data.get('version')}, this tool reads {LOCK_VERSION}; use the version "
            "of acip-export that wrote it, or delete it and run  acip-export check --update"
        )
    try:
        return {name: _snapshot(entry) for name, entry in data["entries"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaselineError(
            f"{file} is damaged or was edited by hand: {error!r}; write it again with  acip-export check --update"
        ) from error


def _snapshot(entry: Mapping[str, Any]) -> Snapshot:
    quality = entry["quality"]
    snapshot = Snapshot(
        path=_text(entry["path"]),
        kind=_text(entry["kind"]),
        architecture=_text(entry["architecture"]),
        files={_text(name): FileRecord(_count(f["bytes"]), _text(f["sha256"])) for name, f in entry["files"].items()},
        tensors={_text(name): _stored(*fields) for name, fields in entry["tensors"].items()},
        quality=None if quality is None else Quality(**quality),
    )
    if snapshot.total_bytes != entry["total_bytes"]:
        raise ValueError(f"the files of {snapshot.path} add up to {snapshot.total_bytes}, not {entry['total_bytes']}")
    return snapshot


def _stored(type_: object, shape: list[object], nbytes: object) -> Stored:
    return Stored(_text(type_), tuple(_count(extent) for extent in shape), _count(nbytes))


def _text(value: object) -> str:
    # What is printed later must not steer a terminal.
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is no printable text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
