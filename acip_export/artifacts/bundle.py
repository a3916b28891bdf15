"""The bundle: a materialized model as a directory. See docs/bundle.md.

A directory with ``config.json``, the tokenizer's files, ``plan.json``, ``bundle.json`` (provenance and hashes),
``model.safetensors``, ``importance.safetensors`` and, for error feedback, ``feedback.safetensors``. Tensors are named
as in :mod:`acip_export.artifacts.materialized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from acip_export.artifacts.document import Artifact, listed_files, read_artifact
from acip_export.artifacts.materialized import MaterializedModel, check_context, load_materialized, stored_of
from acip_export.artifacts.names import (
    BUNDLE,
    CONFIG_FILE,
    FEEDBACK_FILE,
    IMPORTANCE_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    ArtifactName,
)
from acip_export.artifacts.plan import Plan, load_plan
from acip_export.errors import BundleError
from acip_export.io.atomic import HeaderEntry, read_json_object, read_safetensors_header, sha256_of
from acip_export.io.inputs import Count
from acip_export.io.outputs import DirectoryKind, FileKind, json_kind
from acip_export.model.tensor_names import block_of
from acip_export.rounding.error_feedback import FeedbackFactor, row_parts
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.rounding.quantizer import RoundTrip

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Manifest(Artifact):
    """``bundle.json``: what the bundle was made of and by, and the SHA-256 of its numbers."""

    NAME: ClassVar[ArtifactName] = BUNDLE

    tool: str
    model: str
    model_fingerprint: str
    scores_sha256: str
    source_dtype: str
    weights_sha256: str
    importance_sha256: str
    files: Mapping[str, Count]
    feedback_sha256: str | None = None
    feedback: Mapping[str, str] = field(default_factory=dict)
    row_feedback: Mapping[str, str] = field(default_factory=dict)


# Tensors of a factor in FEEDBACK_FILE, behind its key.
FEEDBACK_PARTS = ("order", "codes", "steps")


def row_keys(key: str, rows: int) -> dict[str, int]:
    """Return under which keys the factors of a matrix's rows are, and how many rows each of them is of."""
    return {f"rows/{key}/{part}": size for part, size in enumerate(row_parts(rows))}


_MANIFEST_KIND = json_kind("a bundle's manifest", BUNDLE.artifact)


def _contents(directory: Path) -> Mapping[str, int | FileKind]:
    files = listed_files(directory / MANIFEST_FILE, BUNDLE)
    return {**files, MANIFEST_FILE: _MANIFEST_KIND} if files else {}


BUNDLE_KIND = DirectoryKind("a bundle", _contents)


class Bundle(MaterializedModel):
    """An opened bundle. Holds no weights; :meth:`read` gets one tensor.

    Attributes:
        path, plan, manifest: the directory, its plan, its ``bundle.json``.
        tensors: header entries of the weights, by name.
        kept: where those who round its matrices keep what they made of them, for each other.
    """

    ERROR = BundleError

    def __init__(
        self,
        path: Path,
        plan: Plan,
        manifest: Manifest,
        tensors: Mapping[str, HeaderEntry],
        kept: KeptRoundings | None = None,
    ) -> None:
        super().__init__(path, plan, read_json_object(path / CONFIG_FILE, BundleError), kept)
        self.manifest = manifest
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path, verify_hash: bool = False, kept: KeptRoundings | None = None) -> Bundle:
        """Open and check a bundle; ``verify_hash`` also reads all its numbers and compares their SHA-256.

        Raises:
            BundleError: not a bundle, damaged, of another version, or its weights do not fit its plan.
            PlanFileError: its plan is damaged.
        """
        if not (path / MANIFEST_FILE).exists():
            raise BundleError(f"{path} is no bundle: it has no {MANIFEST_FILE}")
        manifest = read_artifact(path / MANIFEST_FILE, Manifest, BundleError)
        plan = load_plan(path / PLAN_FILE)
        tensors, _ = read_safetensors_header(path / WEIGHTS_FILE, BundleError)
        bundle = cls(path, plan, manifest, tensors, kept)
        bundle._check_shapes()
        bundle._check_rows()
        check_context(plan, bundle.as_checkpoint())
        hashes = {WEIGHTS_FILE: manifest.weights_sha256, IMPORTANCE_FILE: manifest.importance_sha256}
        if manifest.feedback_sha256 is not None:
            hashes[FEEDBACK_FILE] = manifest.feedback_sha256
        for name, expected in hashes.items() if verify_hash else ():
            if not (path / name).is_file():
                raise BundleError(f"{path} has no {name}; materialize again")
            if sha256_of(path / name) != expected:
                raise BundleError(
                    f"{path / name} has changed since it was written (SHA-256 differs); materialize again"
                )
        return bundle

    def _check_shapes(self) -> None:
        for decision in self.plan.tensors:
            for name, shape in stored_of(decision).items():
                entry = self.tensors.get(name)
                if entry is None or entry.shape != shape:
                    found = "missing" if entry is None else f"of shape {entry.shape}"
                    raise BundleError(f"{self.path}: {name} is {found}, the plan expects {shape}")

    def _check_rows(self) -> None:
        for name in self.manifest.row_feedback:
            if name not in self.manifest.feedback or block_of(name) is None or name not in self.tensors:
                raise BundleError(
                    f"{self.path / MANIFEST_FILE} is damaged: {name} is no matrix of a layer with feedback"
                )

    @property
    def made_of(self) -> str:
        """See :class:`MaterializedModel`."""
        manifest = self.manifest
        return f"{manifest.weights_sha256} {manifest.importance_sha256} {manifest.feedback_sha256}"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See :class:`MaterializedModel`."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def has_importance(self, name: str) -> bool:
        """See :class:`MaterializedModel`."""
        return self.importance(name) is not None

    def importance(self, name: str) -> torch.Tensor | None:
        """See :class:`MaterializedModel`; float32."""
        from safetensors import safe_open

        with safe_open(self.path / IMPORTANCE_FILE, framework="pt") as file:
            return file.get_tensor(name) if name in set(file.keys()) else None

    def feedback(self, name: str) -> FeedbackFactor | None:
        """See :class:`MaterializedModel`.

        Raises:
            BundleError: its factor is missing, damaged, or of another matrix.
        """
        key = self.manifest.feedback.get(name)
        return None if key is None else self._factor(key, name, self.tensors[name].shape[-1], "inputs")

    def row_feedback(self, name: str) -> Sequence[FeedbackFactor] | None:
        """See :class:`MaterializedModel`; raises as :meth:`feedback`."""
        key = self.manifest.row_feedback.get(name)
        if key is None:
            return None
        sizes = row_keys(key, self.tensors[name].shape[0])
        return [self._factor(part, name, rows, "rows") for part, rows in sizes.items()]

    def _factor(self, key: str, name: str, size: int, what: str) -> FeedbackFactor:
        from safetensors import SafetensorError, safe_open

        file = self.path / FEEDBACK_FILE
        try:
            with safe_open(file, framework="numpy") as opened:
                order, codes, steps = (opened.get_tensor(f"{key}/{part}") for part in FEEDBACK_PARTS)
            factor = FeedbackFactor(order, codes, steps)
            factor.check(f"the factor {key!r} of {name}")
        except (SafetensorError, OSError, ValueError) as reason:
            raise BundleError(f"{file} is damaged: {reason}; materialize again") from reason
        if factor.size != size:
            raise BundleError(
                f"{file}: the factor {key!r} is of {factor.size} {what}, {name} has {size}; materialize again"
            )
        return factor


def load_bundle(path: Path | str, round_trip: RoundTrip | None = None) -> nn.Module:
    """The bundle as a float32 ``torch.nn.Module`` in evaluation mode: the reference for every export.

    Args:
        round_trip: the quantizer of the plan's format, ``export_format(plan.format).round_trip``:
            matrices then have the numbers that the export has. ``None``: as stored, before rounding.

    Raises:
        BundleError: see :meth:`Bundle.open`.
    """
    return load_materialized(Bundle.open(Path(path)), round_trip)


def bundle_beside(export: Path) -> Path:
    """Return the directory of the bundle that is kept with an export."""
    return export.with_name(f"{export.name}-bundle")
