"""How fast a machine is, by runtime and weight type: what ``acip-export calibrate`` measures. See docs/speed.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from acip_export.artifacts.document import Artifact, read_artifact
from acip_export.artifacts.names import SPEEDS, ArtifactName
from acip_export.artifacts.plan import Name
from acip_export.errors import DeviceFileError, SpeedsVersionError
from acip_export.io.inputs import Count, NotNegative, Positive, PositiveFloat, Share
from acip_export.io.outputs import claim_output, json_kind

# How far off predictions may be at best, docs/speed.md.
LEAST_ERROR = 0.15
SPEEDS_KIND = json_kind(SPEEDS.noun, SPEEDS.artifact)


@dataclass(frozen=True)
class MatrixSpeed:
    """What a runtime does with matrices of one type, in a model of some size.

    Attributes:
        nbytes: of all matrices of that model. Those of a small one stay in the processor's caches.
        read: bytes of them a second, when one token is computed.
        compute: operations a second, when a prompt is; a weight and a token are two.
    """

    nbytes: Positive
    read: PositiveFloat
    compute: PositiveFloat


@dataclass(frozen=True)
class LayerSpeed:
    """What a layer takes for a token of an answer beside its matrices.

    Attributes:
        nbytes: of all matrices of the model.
    """

    nbytes: Positive
    seconds: NotNegative


@dataclass(frozen=True)
class CacheSpeed:
    """What a runtime does with a KV cache of one type.

    Attributes:
        read: bytes of it a second, when one token is computed.
        attention: operations a second of a prompt's attention.
    """

    read: PositiveFloat
    attention: PositiveFloat


@dataclass(frozen=True)
class RuntimeSpeed:
    """What one runtime does in a second, and what it takes beside that.

    Attributes:
        version: of the runtime.
        matrices: by type, measured in models of several sizes.
        token_seconds: of a token of an answer, whatever is read.
        layers: what each layer takes for it beside that, measured in models of several sizes. Matrices that are not in
            a core's caches take a moment each until they are read at their rate.
        width_seconds: of a token of a prompt, for each layer and each number of its width, beside its matrices.
        cache_read: bytes of a KV cache of the format's own type a second.
        attention: operations a second of a prompt's attention with such a cache.
        head_share: of a prompt's tokens, those for which the head is computed, as far as it shows.
        caches: the same of KV caches of other types, keys and values alike; of one that is not here, as of the own.
        prompt_error, answer_error: how far predictions may be off, as a share of them; ``None``: not known.
        layer_error: how far the seconds of layers may be off beside that, as a share of them.
        smallest: numbers in the matrices of the smallest model that was timed; for smaller ones the errors grow.
        prompts: whether prompts were timed. Otherwise operations are those of answers, which prompts exceed, and the
            speed of prompts is not predicted.
    """

    version: str
    matrices: Mapping[Name, Annotated[tuple[MatrixSpeed, ...], Meta(min_length=1)]]
    token_seconds: NotNegative
    layers: Annotated[tuple[LayerSpeed, ...], Meta(min_length=1)]
    width_seconds: NotNegative
    cache_read: PositiveFloat
    attention: PositiveFloat
    head_share: Share
    caches: Mapping[Name, CacheSpeed] = field(default_factory=dict)
    prompt_error: NotNegative | None = None
    answer_error: NotNegative | None = None
    layer_error: NotNegative = 0.0
    smallest: Count = 0
    prompts: bool = True

    def matrix(self, type: str, nbytes: int) -> MatrixSpeed:
        """Return the speeds of matrices of ``type`` in a model of so many bytes; raises KeyError: not measured."""
        points = self.matrices[type]
        read, compute = (
            exp(_between(speeds, nbytes))
            for speeds in ({p.nbytes: log(p.read) for p in points}, {p.nbytes: log(p.compute) for p in points})
        )
        return MatrixSpeed(nbytes, read, compute)

    def layer_seconds(self, nbytes: int) -> float:
        """Return what a layer takes for a token of an answer, beside its matrices, in a model of so many bytes."""
        return _between({point.nbytes: point.seconds for point in self.layers}, nbytes)

    def cache(self, type: str) -> CacheSpeed:
        """Return the speeds of a cache of ``type``."""
        return self.caches.get(type) or CacheSpeed(self.cache_read, self.attention)


def _between(measured: Mapping[int, float], nbytes: int) -> float:
    """Interpolate between models of neighbouring sizes, by the logarithm of bytes; constant beyond the outer ones.

    Args:
        measured: by the bytes of a model.
    """
    sizes = sorted(measured)
    return float(np.interp(log(max(nbytes, 1)), [log(size) for size in sizes], [measured[size] for size in sizes]))


@dataclass(frozen=True)
class SpeedTable(Artifact):
    """The speeds of one machine.

    Attributes:
        machine: its name, for people. threads: that the runtimes had.
    """

    NAME: ClassVar[ArtifactName] = SPEEDS

    machine: str
    threads: Positive
    runtimes: Mapping[Name, RuntimeSpeed]


def load_speeds(file: Path) -> SpeedTable:
    """Read and check a table. Raises DeviceFileError; of another version: SpeedsVersionError."""
    missing = "; make it with  acip-export calibrate"
    return read_artifact(file, SpeedTable, DeviceFileError, missing, SpeedsVersionError)


def save_speeds(table: SpeedTable, file: Path, force: bool = True) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with claim_output(file, SPEEDS_KIND, force).new_file() as temporary:
        temporary.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
