"""Describe one model as the check sees it, now or in the baseline: sizes, hashes, tensors, quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from acip_export.check.quality import Quality
from acip_export.errors import ModelFileError
from acip_export.inspection import read_anatomy
from acip_export.inspection.diff import Stored, stored_tensors
from acip_export.io.atomic import sha256_of


@dataclass(frozen=True)
class FileRecord:
    """The size of a file, and its hash; ``sha256`` is empty where the contents were not read."""

    nbytes: int
    sha256: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What is known of a model file or directory.

    Attributes:
        path: the path in the configuration.
        kind: see :class:`acip_export.inspection.anatomy.Anatomy`.
        architecture: the name in the GGUF file or the Hugging Face configuration; empty if there is none.
        files: the files by their path below the model.
        tensors: the tensors by name; empty where only sizes are known.
        quality: from the report, where there is one.
    """

    path: str
    kind: str
    architecture: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Stored]
    quality: Quality | None = None

    @property
    def total_bytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(tensor.nbytes for tensor in self.tensors.values())


def take_snapshot(model: Path, path: str) -> Snapshot:
    """Read the headers of a model; :func:`with_hashes` reads its contents.

    Args:
        model: file or directory.
        path: its path in the configuration.

    Raises:
        AcipError: what :func:`read_anatomy` raises.
    """
    anatomy = read_anatomy(model)
    architecture = anatomy.facts.get("general.architecture") or anatomy.facts.get("architectures", "")
    files = {name: FileRecord(nbytes) for name, nbytes in anatomy.files.items()}
    return Snapshot(path, anatomy.kind, architecture, files, stored_tensors(anatomy))


def with_hashes(snapshot: Snapshot, model: Path) -> Snapshot:
    """Return the snapshot with the hashes of all files; those of a plan need not exist and get none.

    Raises:
        ModelFileError: a file cannot be read.
    """
    if snapshot.kind == "plan":
        return snapshot
    root = model if model.is_dir() else model.parent
    try:
        files = {name: FileRecord(file.nbytes, sha256_of(root / name)) for name, file in snapshot.files.items()}
    except OSError as error:
        raise ModelFileError(f"{model} cannot be read: {error}") from error
    return replace(snapshot, files=files)
