"""The score file (``*.acip``): what the ranking stage learned about a model. See docs/score-file.md.

A safetensors file. Its header metadata holds six JSON documents (``model``, ``algorithm``, ``data``, ``versions``,
``curve``, ``modules``); its tensors are named ``MODULE/…`` after the Hugging Face module they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from acip_export.artifacts.cache_losses import CacheLosses
from acip_export.artifacts.document import Header, check_header
from acip_export.artifacts.measured_losses import MeasuredLosses
from acip_export.artifacts.names import SCORE_FILE_SUFFIX, SCORES
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.errors import ScoreFileError
from acip_export.io.atomic import HeaderEntry, SafetensorsWriter, read_safetensors_header
from acip_export.io.inputs import (
    Count,
    Finite,
    NotNegative,
    Positive,
    Share,
    builtins,
    convert,
    decode_strictly,
    read_only,
)
from acip_export.io.outputs import claim_output, safetensors_kind
from acip_export.lowrank.moments import PackedMoment, moment_name
from acip_export.lowrank.order import GlobalOrder
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.task import LOSS_UNITS, Task

SCORES_KIND = safetensors_kind(SCORES.noun, SCORES.artifact)

FloatArray = npt.NDArray[np.float32]
AdapterScaling = Literal["constant", "dropped"]
Basis = Literal["svd", "input", "kfac"]
Setting = str | int | Finite | bool | None | tuple[Finite, ...]


def adapter_share(scaling: AdapterScaling, kept: int, components: int) -> float:
    """What an adapter is multiplied with where ``kept`` of the ``components`` are left.

    ``constant``: 1 (ACIP, section 3.1). ``dropped``: twice the share that is dropped, so that an adapter, which stands
    in for what is missing, leaves a whole layer alone, and is LoRA's where half is gone.
    """
    return 1.0 if scaling == "constant" else 2 * (1 - kept / components)


@dataclass(frozen=True)
class ModuleScores:
    """One linear module. All arrays are float32; ``k = min(out, in)`` singular components, in the basis's order.

    Attributes:
        shape: ``(out, in)``.
        scores: (k,) larger is more important; negative: minus the steps since it was pruned, plus a fraction below one
            that breaks ties by predicted loss.
        drop_loss: (k,) predicted loss of dropping the component, nats per token (second order).
        up_sensitivity, down_sensitivity: (k,) predicted loss of rounding the component's column of ``up`` or row of
            ``down`` with a relative mean square error of one.
        sensitivity: the same for the dense weight.
        input_moment: (in,) E[x^2] of the inputs. gradient_moment: (out,) E[g^2] of the loss gradients at the outputs.
        input_key, gradient_key: names of the full second moments that the basis was made from; empty: identity.
        adapter_a, adapter_b: (a, in) and (out, a) with the LoRA scale folded into ``adapter_b``; ``None`` when the
            algorithm learns no adapters. adapter_scaling: what they are multiplied with at a size.
    """

    shape: tuple[int, int]
    scores: FloatArray
    drop_loss: FloatArray
    up_sensitivity: FloatArray
    down_sensitivity: FloatArray
    sensitivity: float
    input_moment: FloatArray
    gradient_moment: FloatArray
    input_key: str = ""
    gradient_key: str = ""
    adapter_a: FloatArray | None = None
    adapter_b: FloatArray | None = None
    adapter_scaling: AdapterScaling = "constant"

    def adapter(self, kept: int) -> tuple[FloatArray, FloatArray] | None:
        """``(b, a)`` where ``kept`` components are left; ``None`` if they add nothing."""
        share = adapter_share(self.adapter_scaling, kept, len(self.scores))
        if self.adapter_a is None or self.adapter_b is None or share == 0:
            return None
        return np.float32(share) * self.adapter_b, self.adapter_a

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Components from most to least important; equal scores keep the basis's order."""
        return np.argsort(-self.scores, kind="stable")


@dataclass(frozen=True)
class CurvePoint:
    """Measured quality when the linear layers are cut to ``ratio`` of their parameters in the global order.

    Losses are nats per token on text that the ranking was not calibrated on; for encoders, the divergence from the
    dense model in the unit that :attr:`ScoreFile.loss_unit` names.

    Attributes:
        divergence, divergence_with_adapters: of a causal model from the dense one, nats per token; ``None``: the file
            was made before it was measured.
        spearman, similarity_error: of a sentence embedding, adapters included where they lower the loss: see
            :class:`acip_export.model.embedding_similarity.Similarity`.
    """

    ratio: Share
    loss: Finite
    loss_with_adapters: Finite | None = None
    spearman: Finite | None = None
    similarity_error: Finite | None = None
    divergence: NotNegative | None = None
    divergence_with_adapters: NotNegative | None = None

    @property
    def adapters_help(self) -> bool:
        """Whether adapters lower the loss of the cut."""
        return self.loss_with_adapters is not None and self.loss_with_adapters < self.loss

    def above(self, dense: CurvePoint) -> float:
        """Return what the cut loses, with adapters where they help.

        Where adapters have learned the text, that is less than the divergence. Plans that were made with the divergence
        instead were worse, though better predicted (docs/LOG.md): plans are chosen by this, and predict both.
        """
        return min(loss for loss in (self.loss, self.loss_with_adapters) if loss is not None) - dense.loss

    @property
    def divergence_as_cut(self) -> float | None:
        """The divergence of what :meth:`above` is of; ``None`` where it was not measured."""
        return self.divergence_with_adapters if self.adapters_help else self.divergence


@dataclass(frozen=True)
class RankedModel:
    """The model that was ranked.

    Attributes:
        weights_sha256: of all of its numbers, see :func:`acip_export.model.weights_hash.weights_sha256`; ``None``: the
            score file does not say.
    """

    name: str
    fingerprint: str
    weights_sha256: str | None = None


@dataclass(frozen=True)
class RankedOn:
    """The text of the ranking; ``sha256`` is of the tokens where the model wrote it itself.

    Attributes:
        held_out: windows that the curve was measured on: the last ones of the text, or the first of ``evaluation``.
        evaluation, evaluation_sha256: a text of its own for the curve, if there was one.
    """

    source: str
    sha256: str
    documents: Count | None = field(default=None, kw_only=True)
    tokens: Count
    held_out: Count | None = field(default=None, kw_only=True)
    evaluation: str | None = field(default=None, kw_only=True)
    evaluation_sha256: str | None = field(default=None, kw_only=True)


class RankedBy(msgspec.Struct, frozen=True):
    """Of :attr:`ScoreFile.algorithm` what this tool goes by; the rest is for people.

    Attributes:
        context: tokens of a window. statistics_tokens: that second moments of inputs were measured on;
        gradient_tokens: those of gradients.
        field, most_tokens: how the text was read.
    """

    name: str
    basis: Basis
    context: Count | None = None
    statistics_tokens: Count | None = None
    gradient_tokens: Count | None = None
    field: str | None = None
    most_tokens: Count | None = None


@dataclass(frozen=True)
class ScoreFile:
    """A whole score file.

    Attributes:
        task: what the model is for.
        algorithm: ``name``, ``basis`` and every hyper-parameter, seed included.
        versions: of the tool and the libraries.
        curve: measured, from ratio 1 downwards.
        modules: by Hugging Face module name.
        embedding_sensitivity: as :attr:`ModuleScores.sensitivity`, for the embedding and, if it is untied, the head,
            by tensor name.
        second_moments: full ones, packed, by key; of a file, read when asked for. Of a module with more outputs than
            inputs the output gradients' is :func:`acip_export.lowrank.moments.projected`. The keys of embedding and
            head are their tensors' names: see :meth:`moment_key`.
        slim: second moments were measured and left out.
        sha256: identifies the file: over its header, every tensor but the second moments, and the first 4 KiB of each
            of those.
        file: that it was read from.
        rounding_errors, measured_losses, cache_losses: what was measured for scores that are in no file, by format; for
            others caches beside the file have it.
    """

    model: RankedModel
    task: Task
    algorithm: Mapping[str, Setting]
    data: RankedOn
    versions: Mapping[str, str]
    curve: tuple[CurvePoint, ...]
    modules: Mapping[str, ModuleScores]
    embedding_sensitivity: Mapping[str, float]
    second_moments: Mapping[str, PackedMoment]
    slim: bool = False
    sha256: str = ""
    file: Path | None = field(default=None, compare=False)
    rounding_errors: dict[str, RoundingErrors] = field(default_factory=dict, init=False, repr=False, compare=False)
    measured_losses: dict[str, MeasuredLosses] = field(default_factory=dict, init=False, repr=False, compare=False)
    cache_losses: dict[str, CacheLosses] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def basis(self) -> str:
        return self.ranked_by.basis

    @cached_property
    def ranked_by(self) -> RankedBy:
        """The algorithm's own fields."""
        return convert(dict(self.algorithm), RankedBy, f"{self.file or 'scores'}: algorithm", ScoreFileError)

    def moment_tokens(self, key: str = "") -> int | None:
        """Return how many tokens a second moment was measured on, at most; where it is not said, all of the text.

        Args:
            key: of embedding or head, which take gradients; else of any layer's inputs.
        """
        asked = [self.ranked_by.statistics_tokens]
        if key in self.embedding_sensitivity:
            asked.append(self.ranked_by.gradient_tokens)
        return min((count for count in (*asked, self.data.tokens) if count), default=None)

    def moment(self, key: str) -> PackedMoment:
        """Return a second moment that knows how many tokens it is of."""
        return replace(self.second_moments[key], tokens=self.moment_tokens(key))

    @property
    def loss_unit(self) -> str:
        """What every loss in the file is counted in."""
        return LOSS_UNITS[self.task]

    def without_moments(self) -> ScoreFile:
        """Return what is left for planning types: a hundredth of the model's bytes."""
        modules = {name: replace(module, input_key="", gradient_key="") for name, module in self.modules.items()}
        return replace(self, modules=read_only(modules), second_moments={}, slim=True, sha256="", file=None)

    @property
    def whole_again(self) -> str:
        """The command that makes what a slim score file leaves out."""
        return f"acip-export rank . --data {self.data.source} --algorithm {self.ranked_by.name} --force"

    @cached_property
    def global_order(self) -> GlobalOrder:
        """All components of all modules, from least to most important."""
        return GlobalOrder(
            {name: module.scores for name, module in self.modules.items()},
            {name: module.shape for name, module in self.modules.items()},
        )

    def moment_key(self, tensor: str) -> str:
        """Name the second moment that an error in a row of a weight costs by: of its inputs; empty: not known.

        Rows of an embedding are not multiplied but read: theirs is of the gradients that come back to them, plus,
        where the head is tied, the head's inputs times the variance of the labels that a row predicts.
        """
        module = self.modules.get(tensor.removesuffix(".weight"))
        if module is not None:
            return module.input_key
        return tensor if tensor in self.embedding_sensitivity and tensor in self.second_moments else ""

    def ranks_at(self, ratio: float) -> dict[str, int]:
        """See :meth:`GlobalOrder.ranks_at`."""
        return self.global_order.ranks_at(ratio)

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse the score file of another model.

        Raises:
            ScoreFileError: fingerprint, modules or shapes differ.
        """
        expected = checkpoint.linear_modules
        missing = sorted(set(expected) - set(self.modules))
        if self.model.fingerprint != checkpoint.fingerprint:
            raise ScoreFileError(
                f"the score file was made for {self.model.name!r} ({self.model.fingerprint[:12]}…), not for "
                f"{checkpoint.path} ({checkpoint.fingerprint[:12]}…).\n"
                f"Rank this model:  acip-export rank {checkpoint.path} --data TEXT"
            )
        if missing:
            raise ScoreFileError(f"the score file lacks {len(missing)} modules of the model, first {missing[0]!r}")
        for name, shape in expected.items():
            if self.modules[name].shape != shape:
                raise ScoreFileError(f"{name} has shape {shape}, the score file has {self.modules[name].shape}")


def check_weights(scores: ScoreFile, checkpoint: Checkpoint) -> None:
    """Refuse weights that changed where the fingerprint does not look: it takes a sample of each tensor.

    Raises:
        ScoreFileError: they are not those that were ranked. A score file that does not say is taken as it is.
    """
    ranked = scores.model.weights_sha256
    if ranked is not None and ranked != (found := checkpoint.weights_sha256):
        raise ScoreFileError(
            f"{checkpoint.path} has other weights than those that were ranked: their SHA-256 is {found[:12]}…, the "
            f"score file was made for {ranked[:12]}….\n"
            f"Rank this model:  acip-export rank {checkpoint.path} --data TEXT"
        )


_MOMENT, _EMBEDDING = "second_moment/", "/embedding_sensitivity"
_MOMENT_SAMPLE = 4096
_ROWS, _CODES = "/rows", "/codes"
# Predictions, which are right to a few per cent at best, have three digits; scores, an order, have all.
_VECTORS = {"scores": "F32", "drop_loss": "BF16", "up_sensitivity": "BF16", "down_sensitivity": "BF16"}
_T = TypeVar("_T")
_Curve = Annotated[tuple[CurvePoint, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class ModuleEntry:
    """What the header says about a module: its shape, and the keys of its second moments, or empty."""

    shape: tuple[Positive, Positive]
    input: str
    gradient: str
    adapter_scaling: AdapterScaling | None = None


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header's strings; all but the first four are JSON."""

    artifact: str
    version: str
    task: Task
    moments: Literal["packed", "left out"]
    model: str
    algorithm: str
    data: str
    versions: str
    curve: str
    modules: str


def rounded(vector: FloatArray) -> FloatArray:
    """Round to the three digits that a score file has of predicted losses."""
    return _widened(_shortened(vector))


def _shortened(vector: FloatArray) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(vector, "<f4").view("<u4")
    short: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return short


def _widened(short: npt.NDArray[np.uint16]) -> FloatArray:
    return (short.astype("<u4") << 16).view("<f4")


def save_scores(scores: ScoreFile, file: Path, force: bool = False) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    tensors: dict[str, tuple[str, FloatArray]] = {}
    layout: dict[str, ModuleEntry] = {}

    def put(name: str, vector: FloatArray, dtype: str = "F32") -> None:
        tensors[name] = dtype, vector

    for name, module in scores.modules.items():
        adapters = module.adapter_a is not None and module.adapter_b is not None
        layout[name] = ModuleEntry(
            shape=module.shape,
            input=module.input_key,
            gradient=module.gradient_key,
            adapter_scaling=module.adapter_scaling if adapters else None,
        )
        for vector, dtype in _VECTORS.items():
            put(f"{name}/singular/{vector}", getattr(module, vector), dtype)
        put(f"{name}/sensitivity", np.array([module.sensitivity], np.float32))
        put(f"{name}/input_moment", module.input_moment)
        put(f"{name}/gradient_moment", module.gradient_moment)
        if module.adapter_a is not None and module.adapter_b is not None:
            put(f"{name}/adapter/a", module.adapter_a)
            put(f"{name}/adapter/b", module.adapter_b)
    for name, sensitivity in scores.embedding_sensitivity.items():
        put(f"{name}{_EMBEDDING}", np.array([sensitivity], np.float32))
    metadata = {
        "artifact": SCORES.artifact,
        "version": str(SCORES.version),
        "task": scores.task,
        "moments": "left out" if scores.slim else "packed",
        "model": json.dumps(builtins(scores.model)),
        "algorithm": json.dumps(builtins(scores.algorithm)),
        "data": json.dumps(builtins(scores.data)),
        "versions": json.dumps(builtins(scores.versions)),
        "curve": json.dumps(builtins(scores.curve)),
        "modules": json.dumps(
            {name: {k: v for k, v in builtins(entry).items() if v is not None} for name, entry in layout.items()}
        ),
    }
    with claim_output(file, SCORES_KIND, force).new_file() as temporary:
        # The library's writer puts the metadata in random order; equal scores are to give equal files.
        declared = {name: (dtype, value.shape) for name, (dtype, value) in tensors.items()}
        # One second moment is in memory at a time: of a large model they are gigabytes.
        for key in scores.second_moments:
            packed = scores.second_moments[key]
            declared[f"{_MOMENT}{key}{_ROWS}"] = "F32", (3, packed.size)
            declared[f"{_MOMENT}{key}{_CODES}"] = "U8", packed.codes.shape
        with SafetensorsWriter(temporary, declared, metadata) as writer:
            for name, (dtype, value) in tensors.items():
                stored = _shortened(value) if dtype == "BF16" else np.ascontiguousarray(value, "<f4")
                writer.write(name, stored.tobytes())
            for key in scores.second_moments:
                packed = scores.second_moments[key]
                writer.write(f"{_MOMENT}{key}{_ROWS}", np.ascontiguousarray(packed.rows, "<f4").tobytes())
                writer.write(f"{_MOMENT}{key}{_CODES}", packed.codes.tobytes())


def load_scores(file: str | os.PathLike[str]) -> ScoreFile:
    """Read and check a score file.

    Raises:
        ScoreFileError: truncated, not a score file, unknown version, wrong shapes, non-finite numbers.
    """
    file = Path(file)
    entries, metadata = read_safetensors_header(file, ScoreFileError)
    version = metadata.get("version")  # text, as all metadata of safetensors
    known = SCORES.version if version == str(SCORES.version) else version
    check_header(Header(metadata.get("artifact"), known), SCORES, str(file), ScoreFileError)
    documents = convert(metadata, Metadata, f"{file}: metadata", ScoreFileError)
    for name, entry in entries.items():
        expected = _dtype(name)
        if entry.dtype != expected:
            raise ScoreFileError(f"{file}: {name!r} is {entry.dtype}, expected {expected}")
    moments = _SecondMoments(file, {name: entry for name, entry in entries.items() if name.startswith(_MOMENT)})
    tensors = {name: _read(file, name, entry) for name, entry in entries.items() if not name.startswith(_MOMENT)}

    def document(name: str, kind: type[_T]) -> _T:
        return decode_strictly(getattr(documents, name).encode(), kind, f"{file}: {name}", ScoreFileError)

    curve = document("curve", _Curve)
    if curve[0].ratio != 1 or any(a.ratio <= b.ratio for a, b in pairwise(curve)):
        raise ScoreFileError(f"{file}: curve: its ratios must fall from 1; rank again")
    modules = document("modules", dict[str, ModuleEntry])
    if not modules:
        raise ScoreFileError(f"{file}: modules: it has none; rank again")
    scores = ScoreFile(
        model=document("model", RankedModel),
        task=documents.task,
        algorithm=read_only(document("algorithm", dict[str, Setting])),
        data=document("data", RankedOn),
        versions=read_only(document("versions", dict[str, str])),
        curve=curve,
        modules=read_only({name: _module(file, name, entry, tensors, moments) for name, entry in modules.items()}),
        embedding_sensitivity=read_only(
            {
                name.removesuffix(_EMBEDDING): _scalar(file, name, value)
                for name, value in tensors.items()
                if name.endswith(_EMBEDDING)
            }
        ),
        second_moments=moments,
        slim=documents.moments == "left out",
        sha256=_identity(file, entries, tensors),
        file=file,
    )
    _ = scores.ranked_by
    if scores.slim and len(moments):
        raise ScoreFileError(f"{file} leaves second moments out, and has {next(iter(moments))!r}; rank again")
    return scores


class _SecondMoments(Mapping[str, PackedMoment]):
    """Second moments, read and checked when asked for: of a large model they are gigabytes, and plans need none.

    Attributes:
        sizes: rows of each, by key.
    """

    def __init__(self, file: Path, entries: Mapping[str, HeaderEntry]) -> None:
        self._file, self._entries = file, entries
        keys = [name.removeprefix(_MOMENT).removesuffix(_ROWS) for name in entries if name.endswith(_ROWS)]
        self.sizes: dict[str, int] = {}
        for key in keys:
            rows, codes = (entries.get(f"{_MOMENT}{key}{part}") for part in (_ROWS, _CODES))
            if rows is None or len(rows.shape) != 2 or rows.shape[0] != 3 or rows.shape[1] == 0:
                shape = None if rows is None else rows.shape
                raise ScoreFileError(f"{file}: {moment_name(key)} has rows of shape {shape}, expected (3, n)")
            if codes is None or len(codes.shape) != 1:
                raise ScoreFileError(f"{file}: {moment_name(key)} has no list of codes")
            self.sizes[key] = rows.shape[1]
        if len(entries) != 2 * len(self.sizes):
            raise ScoreFileError(f"{file}: it has codes of second moments without their rows; rank again")

    def __getitem__(self, key: str) -> PackedMoment:
        rows, codes = (_read(self._file, name, self._entries[name]) for name in self._names(key))
        packed = PackedMoment.of(rows, codes.view(np.uint8))
        packed.check(f"{self._file}: {moment_name(key)}")
        return packed

    def __contains__(self, key: object) -> bool:
        return key in self.sizes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def _names(key: str) -> tuple[str, str]:
        return f"{_MOMENT}{key}{_ROWS}", f"{_MOMENT}{key}{_CODES}"


def _dtype(name: str) -> str:
    """The only dtype that a tensor of this name may have."""
    if name.startswith(_MOMENT):
        return "U8" if name.endswith(_CODES) else "F32"
    _, singular, vector = name.rpartition("/singular/")
    return _VECTORS.get(vector, "F32") if singular else "F32"


def _read(file: Path, name: str, entry: HeaderEntry) -> npt.NDArray[Any]:
    stored = {"F32": "<f4", "BF16": "<u2", "U8": "u1"}[entry.dtype]
    try:
        values = np.fromfile(file, stored, prod(entry.shape), offset=entry.offset).reshape(entry.shape)
    except (OSError, ValueError) as reason:
        raise ScoreFileError(f"{file}: {name!r} cannot be read: {reason}") from reason
    if entry.dtype == "BF16":
        values = _widened(values)
    if not np.isfinite(values).all():
        raise ScoreFileError(f"{file}: {name!r} holds NaN or infinity; rank again")
    return values


def _scalar(file: Path, name: str, value: FloatArray) -> float:
    if value.shape != (1,):
        raise ScoreFileError(f"{file}: {name} has shape {value.shape}, expected (1,)")
    return float(value[0])


def _identity(file: Path, entries: Mapping[str, HeaderEntry], tensors: Mapping[str, FloatArray]) -> str:
    """SHA-256 over the header, every tensor but the second moments, and the first 4 KiB of each of those."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(min(entry.offset for entry in entries.values())))
        for name, entry in entries.items():
            if name in tensors:
                digest.update(tensors[name].tobytes())
            else:
                stream.seek(entry.offset)
                digest.update(stream.read(min(entry.nbytes, _MOMENT_SAMPLE)))
    return digest.hexdigest()


def _module(
    file: Path,
    name: str,
    entry: ModuleEntry,
    tensors: dict[str, FloatArray],
    moments: _SecondMoments,
) -> ModuleScores:
    def get(suffix: str, expected: tuple[int, ...]) -> FloatArray:
        tensor = tensors.get(f"{name}/{suffix}")
        if tensor is None:
            raise ScoreFileError(f"{file}: module {name!r} has no {suffix}")
        if tensor.shape != expected:
            raise ScoreFileError(f"{file}: {name}/{suffix} has shape {tensor.shape}, expected {expected}")
        return tensor

    out, inputs = entry.shape
    units = min(out, inputs)
    adapter_a = tensors.get(f"{name}/adapter/a")
    if adapter_a is not None and (adapter_a.ndim != 2 or adapter_a.size == 0):
        raise ScoreFileError(f"{file}: {name}/adapter/a has shape {adapter_a.shape}, expected (rank, {inputs})")
    rank = 0 if adapter_a is None else len(adapter_a)
    for key, width in ((entry.input, inputs), (entry.gradient, min(out, inputs))):
        if key and key not in moments:
            raise ScoreFileError(f"{file}: {moment_name(key)} of {name!r} is missing")
        if key and moments.sizes[key] != width:
            raise ScoreFileError(f"{file}: {moment_name(key)} is of {moments.sizes[key]}, expected {width}")
    vectors = {vector: get(f"singular/{vector}", (units,)) for vector in _VECTORS}
    return ModuleScores(
        shape=(out, inputs),
        **vectors,
        sensitivity=float(get("sensitivity", (1,))[0]),
        input_moment=get("input_moment", (inputs,)),
        gradient_moment=get("gradient_moment", (out,)),
        input_key=entry.input,
        gradient_key=entry.gradient,
        adapter_a=None if adapter_a is None else get("adapter/a", (rank, inputs)),
        adapter_b=None if adapter_a is None else get("adapter/b", (out, rank)),
        adapter_scaling=entry.adapter_scaling or "constant",
    )


def find_scores(model: Path) -> Path:
    """The one score file beside a model.

    Raises:
        ScoreFileError: none, or several (all are listed).
    """
    found = sorted(model.glob(f"*{SCORE_FILE_SUFFIX}"))
    if not found:
        raise ScoreFileError(
            f"no score file (*{SCORE_FILE_SUFFIX}) in {model}\nMake one with  acip-export rank {model} --data TEXT"
        )
    if len(found) > 1:
        names = "\n".join(f"  {file}" for file in found)
        raise ScoreFileError(f"several score files in {model}:\n{names}\nChoose one with  --scores FILE")
    return found[0]
