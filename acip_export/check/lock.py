"""``acip-check.lock.json``: the committed baseline. Normative description: docs/check.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

from acip_export.artifacts.document import Artifact, decode_artifact
from acip_export.artifacts.names import LOCK, ArtifactName
from acip_export.check.quality import Quality
from acip_export.check.snapshot import FileRecord, Snapshot
from acip_export.errors import BaselineError, BaselineVersionError
from acip_export.inspection.diff import Stored
from acip_export.io.inputs import Count, builtins, read_input
from acip_export.io.outputs import FileKind, claim_output

# After a merge conflict it may be no JSON any more; it is written anew then.
LOCK_KIND = FileKind(
    "a baseline",
    re.compile(rb'<{7} |\s*\{(\s*[<|=>]{7}.*\n)?\s*"artifact"\s*:\s*"%b"' % re.escape(LOCK.artifact.encode())),
)


@dataclass(frozen=True)
class LockedFile:
    """A file of a model; ``sha256`` is empty where the contents were not read."""

    bytes: Count
    sha256: str


# Type, shape and bytes of a tensor, in the words of its file.
LockedTensor = tuple[str, tuple[Count, ...], Count]


@dataclass(frozen=True)
class LockedModel:
    """A :class:`Snapshot` in the lock file; ``total_bytes`` is the sum over ``files``."""

    path: str
    kind: str
    architecture: str
    total_bytes: Count
    files: Mapping[str, LockedFile]
    quality: Quality | None
    tensors: Mapping[str, LockedTensor]


@dataclass(frozen=True)
class Lock(Artifact):
    """The lock file; ``entries`` are by the names of the configuration's."""

    NAME: ClassVar[ArtifactName] = LOCK

    entries: Mapping[str, LockedModel]


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
            "quality": builtins(snapshot.quality),
        }
        lines = [f'   "{key}": {_dump(value)}' for key, value in head.items()]
        tensors = [f"    {_dump(key)}: {_dump([t.type, t.shape, t.nbytes])}" for key, t in snapshot.tensors.items()]
        lines.append('   "tensors": {' + ("\n" + ",\n".join(tensors) + "\n   }" if tensors else "}"))
        entries.append(f"  {_dump(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    body = "{\n" + ",\n".join(entries) + "\n }" if entries else "{}"
    return f'{{\n "artifact": "{LOCK.artifact}",\n "version": {LOCK.version},\n "entries": {body}\n}}\n'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def load_lock(file: Path) -> dict[str, Snapshot]:
    """Read and check a lock file.

    Raises:
        BaselineError: unreadable or edited by hand. BaselineVersionError: of an unknown version.
    """
    missing = "; make it with  acip-export check --update  and commit it"
    return decode_lock(read_input(file, BaselineError, missing=missing), file)


def decode_lock(data: bytes, file: Path) -> dict[str, Snapshot]:
    """The snapshots of a lock file's contents. Raises BaselineError as :func:`load_lock`."""

    def fail(message: str) -> BaselineError:
        return BaselineError(
            f"{message}\nAfter a merge conflict, or where it was edited by hand, write it anew:  "
            "acip-export check --update"
        )

    lock = decode_artifact(data, Lock, str(file), fail, BaselineVersionError)
    for name, model in lock.entries.items():
        total = sum(each.bytes for each in model.files.values())
        if total != model.total_bytes:
            raise fail(f"{file}: the files of {model.path} add up to {total:,} bytes, not {model.total_bytes:,}")
        # What is printed later must not steer a terminal.
        texts = chain(
            (name, model.path, model.kind, model.architecture),
            chain.from_iterable((key, each.sha256) for key, each in model.files.items()),
            chain.from_iterable((key, kind) for key, (kind, _, _) in model.tensors.items()),
        )
        unprintable = next((text for text in texts if not text.isprintable()), None)
        if unprintable is not None:
            raise fail(f"{file}: {unprintable!r} is no printable text")
    return {name: _snapshot(model) for name, model in lock.entries.items()}


def _snapshot(model: LockedModel) -> Snapshot:
    return Snapshot(
        path=model.path,
        kind=model.kind,
        architecture=model.architecture,
        files={name: FileRecord(each.bytes, each.sha256) for name, each in model.files.items()},
        tensors={name: Stored(*fields) for name, fields in model.tensors.items()},
        quality=model.quality,
    )
