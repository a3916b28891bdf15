"""The bundle: a materialized model, and the numeric reference for every export. See docs/bundle.md.

A directory with ``config.json``, the tokenizer's files, ``plan.json``, ``bundle.json`` (provenance and hashes),
``model.safetensors``, ``importance.safetensors`` and, for error feedback, ``feedback.safetensors``. A dense weight
keeps its name (``M.weight``); a factor pair is ``M.up.weight`` (out, rank) and ``M.down.weight`` (rank, in), and stands
for ``up @ down`` (plus ``M.weight``, where an adapter has a base that is not zero).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from acip_export.artifacts.document import Artifact, listed_files, read_artifact
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
from acip_export.artifacts.plan import Plan, TensorDecision, load_plan
from acip_export.error_feedback import FeedbackFactor
from acip_export.errors import BundleError, PlanFileError
from acip_export.io.atomic import HeaderEntry, read_json_object, read_safetensors_header, sha256_of
from acip_export.io.inputs import Count
from acip_export.io.outputs import DirectoryKind, FileKind, json_kind
from acip_export.kept_roundings import KeptRoundings
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding import InputMoments, RoundTrip

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


# Tensors of a factor in FEEDBACK_FILE, behind its key.
FEEDBACK_PARTS = ("order", "codes", "steps")

_MANIFEST_KIND = json_kind("a bundle's manifest", BUNDLE.artifact)


def _contents(directory: Path) -> Mapping[str, int | FileKind]:
    files = listed_files(directory / MANIFEST_FILE, BUNDLE)
    return {**files, MANIFEST_FILE: _MANIFEST_KIND} if files else {}


BUNDLE_KIND = DirectoryKind("a bundle", _contents)


class Bundle:
    """An opened bundle. Holds no weights; :meth:`read` gets one tensor.

    Attributes:
        path, plan, manifest: the directory, its plan, its ``bundle.json``.
        checkpoint: the same directory seen as a model directory (config, tokenizer).
        tensors: header entries of the weights, by name.
        kept: where those who round its matrices keep what they made of them, for each other.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        manifest: Manifest,
        tensors: Mapping[str, HeaderEntry],
        kept: KeptRoundings | None = None,
    ) -> None:
        self.path = path
        self.kept = kept
        self.plan = plan
        self.manifest = manifest
        self.tensors = tensors
        self.config = read_json_object(path / CONFIG_FILE, BundleError)

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

    @property
    def source_dtype(self) -> str:
        """safetensors dtype of the base model's weights, for example ``BF16``."""
        return self.manifest.source_dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def importance(self, name: str) -> torch.Tensor | None:
        """Second moments of the inputs that meet this weight's columns, (in,) float32; ``None`` when not known."""
        from safetensors import safe_open

        with safe_open(self.path / IMPORTANCE_FILE, framework="pt") as file:
            return file.get_tensor(name) if name in set(file.keys()) else None

    def inputs(self, name: str) -> InputMoments:
        """What rounding may know about the inputs of a stored matrix.

        Raises:
            BundleError: its factor for error feedback is missing, damaged, or of another matrix.
        """
        return InputMoments(self.importance(name), self._feedback(name), self.kept)

    def _feedback(self, name: str) -> FeedbackFactor | None:
        key = self.manifest.feedback.get(name)
        if key is None:
            return None
        from safetensors import SafetensorError, safe_open

        file = self.path / FEEDBACK_FILE
        try:
            with safe_open(file, framework="numpy") as opened:
                order, codes, steps = (opened.get_tensor(f"{key}/{part}") for part in FEEDBACK_PARTS)
            factor = FeedbackFactor(order, codes, steps)
            factor.check(f"the factor {key!r} of {name}")
        except (SafetensorError, OSError, ValueError) as reason:
            raise BundleError(f"{file} is damaged: {reason}; materialize again") from reason
        if factor.size != self.tensors[name].shape[-1]:
            raise BundleError(
                f"{file}: the factor {key!r} is of {factor.size} inputs, {name} has {self.tensors[name].shape[-1]}; "
                "materialize again"
            )
        return factor

    def as_checkpoint(self) -> Checkpoint:
        """Config and tokenizer, through the interface that predictions use."""
        return Checkpoint(self.path, self.config, {}, self.plan.options)


def check_context(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises PlanFileError for a context beyond the model's: a runtime would ask for the memory of all its tokens."""
    longest = checkpoint.shape.max_context
    if plan.serving.context > longest:
        raise PlanFileError(
            f"the plan's context is {plan.serving.context} tokens, {checkpoint.path} was made for {longest}; plan again"
        )


def stored_tensors(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes under which a weight, or the factor pair in its place, is stored."""
    if rank is None:
        return {name: shape}
    module = name.removesuffix(".weight")
    return {f"{module}.up.weight": (shape[0], rank), f"{module}.down.weight": (rank, shape[1])}


def stored_of(decision: TensorDecision) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that is stored of a decision."""
    base = {decision.name: decision.shape} if decision.representation == "residual" else {}
    return {**stored_tensors(decision.name, decision.shape, decision.rank), **base}


def stored_formats(decision: TensorDecision) -> dict[str, str]:
    """The weight format of each of :func:`stored_of`."""
    if decision.rank is None:
        return {decision.name: decision.type or ""}
    base = {decision.name: decision.type or ""} if decision.representation == "residual" else {}
    return base | {
        f"{decision.module}.up.weight": decision.up_type or "",
        f"{decision.module}.down.weight": decision.down_type or "",
    }


def load_bundle(path: Path | str, round_trip: RoundTrip | None = None) -> nn.Module:
    """The bundle as a float32 ``torch.nn.Module`` in evaluation mode: the reference for every export.

    Args:
        round_trip: the quantizer of the plan's format, ``export_format(plan.format).round_trip``:
            matrices then have the numbers that the export has. ``None``: as stored, before rounding.

    Raises:
        BundleError: see :meth:`Bundle.open`.
    """
    bundle = Bundle.open(Path(path))
    model = untrained_bundle(bundle)
    types = stored_types(bundle.plan)
    state = {name: rounded_tensor(bundle, name, types, round_trip) for name in bundle.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    check_names(bundle, missing, unexpected)
    return model.eval()


def untrained_bundle(bundle: Bundle) -> nn.Module:
    """A model of the bundle's architecture, with factor pairs where the bundle has them; its numbers mean nothing."""
    from acip_export.model.torch_model import FactoredLinear, untrained_model, with_fixed_positions

    model = untrained_model(with_fixed_positions(bundle.config, bundle.plan.serving.context))
    for decision in bundle.plan.tensors:
        if decision.rank is None:
            continue
        parent, _, child = decision.module.rpartition(".")
        outputs, inputs = decision.shape
        dense = model.get_submodule(decision.module)
        factored = FactoredLinear(
            inputs,
            decision.rank,
            outputs,
            base=decision.name in bundle.tensors,
            bias=getattr(dense, "bias", None) is not None,
        )
        setattr(model.get_submodule(parent), child, factored)
    return model.eval()


def stored_types(plan: Plan) -> dict[str, str]:
    """The weight type of every tensor that a bundle of ``plan`` stores."""
    return {name: form for decision in plan.tensors for name, form in stored_formats(decision).items()}


def rounded_tensor(
    bundle: Bundle,
    name: str,
    types: Mapping[str, str],
    round_trip: RoundTrip | None,
    rows: torch.Tensor | slice | None = None,
) -> torch.Tensor:
    """A tensor of a bundle, float32, with the numbers that its export has.

    Args:
        types: as :func:`stored_types`. round_trip: as :func:`load_bundle`. rows: some only; ``None``: all.
    """
    tensor = bundle.read(name)
    tensor = (tensor if rows is None else tensor[rows]).float()
    if round_trip is None or tensor.ndim != 2 or name not in types:
        return tensor
    return round_trip(tensor, types[name], bundle.inputs(name))


def check_names(bundle: Bundle, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises BundleError for tensors that the architecture misses, or does not know."""
    from acip_export.model.torch_model import tied_names

    absent, strange = sorted(set(missing) - tied_names(bundle.as_checkpoint())), sorted(unexpected)
    if absent or strange:
        raise BundleError(
            f"{bundle.path} does not fit its architecture: missing {absent[:3]}, unexpected {strange[:3]}"
        )
