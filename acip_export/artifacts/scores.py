"""The score file (``*.acip``): what the ranking stage learned about a model. See docs/score-file.md.

A safetensors file. Its header metadata holds five JSON documents (``model``, ``algorithm``, ``data``, ``versions``,
``curve``); its tensors are named ``MODULE/…`` after the Hugging Face module they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.errors import ScoreFileError
from acip_export.io.atomic import HeaderEntry, SafetensorsWriter, read_safetensors_header
from acip_export.io.outputs import claim_output, safetensors_kind
from acip_export.lowrank.order import GlobalOrder
from acip_export.model.checkpoint import Checkpoint

SCORES_VERSION = 2
SCORES_KIND = safetensors_kind("a score file", "acip-scores")
SCORE_FILE_SUFFIX = ".acip"
CAUSAL_UNIT = "nats per token"

FloatArray = npt.NDArray[np.float32]
AdapterScaling = Literal["constant", "dropped"]


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
        spearman, similarity_error: of a sentence embedding, adapters included where they lower the loss: see
            :class:`acip_export.model.embedding_similarity.Similarity`.
    """

    ratio: float
    loss: float
    loss_with_adapters: float | None = None
    spearman: float | None = None
    similarity_error: float | None = None


@dataclass(frozen=True)
class ScoreFile:
    """A whole score file.

    Attributes:
        model: ``name`` and ``fingerprint`` of the base model.
        algorithm: ``name``, ``basis`` and every hyper-parameter, seed included.
        data: identity of the calibration data (``source``, ``sha256``, ``tokens``).
        versions: of the tool and the libraries.
        curve: measured, from ratio 1 downwards.
        modules: by Hugging Face module name.
        embedding_sensitivity: as :attr:`ModuleScores.sensitivity`, for the embedding and, if it is untied, the head,
            by tensor name.
        second_moments: upper triangles (``np.triu_indices`` order) of full second moments, by key; of a file, read
            when asked for.
        sha256: identifies the file: over its header, every tensor but the second moments, and the first 4 KiB of each
            of those.
        file: that it was read from.
        rounding_errors: what was measured for scores that are in no file, by format; for others a cache beside the file
            has it.
    """

    model: Mapping[str, str]
    algorithm: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    curve: tuple[CurvePoint, ...]
    modules: Mapping[str, ModuleScores]
    embedding_sensitivity: Mapping[str, float]
    second_moments: Mapping[str, FloatArray]
    sha256: str = ""
    file: Path | None = field(default=None, compare=False)
    rounding_errors: dict[str, RoundingErrors] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def basis(self) -> str:
        return str(self.algorithm["basis"])

    @property
    def loss_unit(self) -> str:
        """Of every loss in the file: ``nats per token`` of a causal model; encoders have others."""
        return str(self.algorithm.get("loss_unit", CAUSAL_UNIT))

    @property
    def is_causal(self) -> bool:
        """Whether the losses are those of a next token, so that their exponentials are perplexities."""
        return self.loss_unit == CAUSAL_UNIT

    @cached_property
    def global_order(self) -> GlobalOrder:
        """All components of all modules, from least to most important."""
        return GlobalOrder(
            {name: module.scores for name, module in self.modules.items()},
            {name: module.shape for name, module in self.modules.items()},
        )

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
        if self.model.get("fingerprint") != checkpoint.fingerprint:
            raise ScoreFileError(
                f"the score file was made for {self.model.get('name')!r} "
                f"({self.model.get('fingerprint', '')[:12]}…), not for {checkpoint.path} "
                f"({checkpoint.fingerprint[:12]}…).\nRank this model:  acip-export rank {checkpoint.path} --data TEXT"
            )
        if missing:
            raise ScoreFileError(f"the score file lacks {len(missing)} modules of the model, first {missing[0]!r}")
        for name, shape in expected.items():
            if self.modules[name].shape != shape:
                raise ScoreFileError(f"{name} has shape {shape}, the score file has {self.modules[name].shape}")


_MOMENT = "second_moment/"
_MOMENT_SAMPLE = 4096
_VECTORS = ("scores", "drop_loss", "up_sensitivity", "down_sensitivity")


def save_scores(scores: ScoreFile, file: Path, force: bool = False) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    tensors: dict[str, FloatArray] = {}
    layout: dict[str, dict[str, Any]] = {}
    for name, module in scores.modules.items():
        layout[name] = {"shape": module.shape, "input": module.input_key, "gradient": module.gradient_key}
        for vector in _VECTORS:
            tensors[f"{name}/singular/{vector}"] = getattr(module, vector)
        tensors[f"{name}/sensitivity"] = np.array([module.sensitivity], np.float32)
        tensors[f"{name}/input_moment"] = module.input_moment
        tensors[f"{name}/gradient_moment"] = module.gradient_moment
        if module.adapter_a is not None and module.adapter_b is not None:
            tensors[f"{name}/adapter/a"] = module.adapter_a
            tensors[f"{name}/adapter/b"] = module.adapter_b
            layout[name]["adapter_scaling"] = module.adapter_scaling
    for name, sensitivity in scores.embedding_sensitivity.items():
        tensors[f"{name}/embedding_sensitivity"] = np.array([sensitivity], np.float32)
    for key, triangle in scores.second_moments.items():
        tensors[f"{_MOMENT}{key}"] = triangle
    metadata = {
        "artifact": "acip-scores",
        "version": str(SCORES_VERSION),
        "model": json.dumps(dict(scores.model)),
        "algorithm": json.dumps(dict(scores.algorithm)),
        "data": json.dumps(dict(scores.data)),
        "versions": json.dumps(dict(scores.versions)),
        "curve": json.dumps([asdict(point) for point in scores.curve]),
        "modules": json.dumps(layout),
    }
    with claim_output(file, SCORES_KIND, force).new_file() as temporary:
        # The library's writer puts the metadata in random order; equal scores are to give equal files.
        declared = {name: ("F32", value.shape) for name, value in tensors.items()}
        with SafetensorsWriter(temporary, declared, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, np.ascontiguousarray(value, "<f4").tobytes())


def load_scores(file: str | os.PathLike[str]) -> ScoreFile:
    """Read and check a score file.

    Raises:
        ScoreFileError: truncated, not a score file, unknown version, wrong shapes, non-finite numbers.
    """
    file = Path(file)
    entries, metadata = read_safetensors_header(file, ScoreFileError)
    if metadata.get("artifact") != "acip-scores":
        raise ScoreFileError(f"{file} is a safetensors file, but no score file (format {metadata.get('artifact')!r})")
    if metadata.get("version") != str(SCORES_VERSION):
        raise ScoreFileError(
            f"{file} is a score file of version {metadata.get('version')}, this tool reads {SCORES_VERSION}; rank again"
        )
    wrong = [name for name, entry in entries.items() if entry.dtype != "F32"]
    if wrong:
        raise ScoreFileError(f"{file}: {wrong[0]!r} is {entries[wrong[0]].dtype}, expected F32")
    moments = _SecondMoments(
        file, {name.removeprefix(_MOMENT): entry for name, entry in entries.items() if name.startswith(_MOMENT)}
    )
    tensors = {name: _read(file, name, entry) for name, entry in entries.items() if not name.startswith(_MOMENT)}
    try:
        layout = json.loads(metadata["modules"])
        return ScoreFile(
            model=json.loads(metadata["model"]),
            algorithm=json.loads(metadata["algorithm"]),
            data=json.loads(metadata["data"]),
            versions=json.loads(metadata["versions"]),
            curve=tuple(CurvePoint(**point) for point in json.loads(metadata["curve"])),
            modules={name: _module(file, name, entry, tensors, moments) for name, entry in layout.items()},
            embedding_sensitivity={
                name.removesuffix("/embedding_sensitivity"): float(value[0])
                for name, value in tensors.items()
                if name.endswith("/embedding_sensitivity")
            },
            second_moments=moments,
            sha256=_identity(file, entries, tensors),
            file=file,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ScoreFileError(f"{file} is damaged: {error!r}") from error


class _SecondMoments(Mapping[str, FloatArray]):
    """Second moments, read and checked when asked for: of a large model they are gigabytes, and plans need none."""

    def __init__(self, file: Path, entries: Mapping[str, HeaderEntry]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, key: str) -> FloatArray:
        return _read(self._file, _MOMENT + key, self._entries[key])

    def __contains__(self, key: object) -> bool:
        return key in self._entries  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read(file: Path, name: str, entry: HeaderEntry) -> FloatArray:
    values = np.fromfile(file, "<f4", entry.nbytes // 4, offset=entry.offset).reshape(entry.shape)
    if not np.isfinite(values).all():
        raise ScoreFileError(f"{file}: {name!r} holds NaN or infinity; rank again")
    return values


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
    entry: dict[str, Any],
    tensors: dict[str, FloatArray],
    moments: Mapping[str, FloatArray],
) -> ModuleScores:
    def get(suffix: str, expected: tuple[int, ...]) -> FloatArray:
        tensor = tensors.get(f"{name}/{suffix}")
        if tensor is None:
            raise ScoreFileError(f"{file}: module {name!r} has no {suffix}")
        if tensor.shape != expected:
            raise ScoreFileError(f"{file}: {name}/{suffix} has shape {tensor.shape}, expected {expected}")
        return tensor

    out, inputs = (int(extent) for extent in entry["shape"])
    units = min(out, inputs)
    adapter_a = tensors.get(f"{name}/adapter/a")
    rank = 0 if adapter_a is None else adapter_a.shape[0]
    scaling = entry.get("adapter_scaling", "constant")
    if scaling not in get_args(AdapterScaling):
        raise ScoreFileError(f"{file}: the adapters of {name!r} are scaled by {scaling!r}, which this tool cannot")
    for key in (entry["input"], entry["gradient"]):
        if key and key not in moments:
            raise ScoreFileError(f"{file}: the second moment {key!r} of {name!r} is missing")
    vectors = {vector: get(f"singular/{vector}", (units,)) for vector in _VECTORS}
    return ModuleScores(
        shape=(out, inputs),
        **vectors,
        sensitivity=float(get("sensitivity", (1,))[0]),
        input_moment=get("input_moment", (inputs,)),
        gradient_moment=get("gradient_moment", (out,)),
        input_key=entry["input"],
        gradient_key=entry["gradient"],
        adapter_a=None if adapter_a is None else get("adapter/a", (rank, inputs)),
        adapter_b=None if adapter_a is None else get("adapter/b", (out, rank)),
        adapter_scaling=scaling,
    )


def find_scores(model: Path) -> Path:
    """The one score file beside a model.

    Raises:
        ScoreFileError: none, or several (all are listed).
    """
    found = sorted(model.glob(f"*{SCORE_FILE_SUFFIX}"))
    if not found:
        raise ScoreFileError(
            f"no score file (*{SCORE_FILE_SUFFIX}) in {model}.\nMake one with  acip-export rank {model} --data TEXT"
        )
    if len(found) > 1:
        names = "\n".join(f"  {file}" for file in found)
        raise ScoreFileError(f"several score files in {model}:\n{names}\nChoose one with  --scores FILE")
    return found[0]
