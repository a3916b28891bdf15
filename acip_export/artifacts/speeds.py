"""How fast a machine is, by runtime and weight type: what ``acip-export calibrate`` measures. See docs/speed.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from acip_export.artifacts.document import Artifact, read_artifact
from acip_export.artifacts.names import SPEEDS, ArtifactName
from acip_export.artifacts.plan import Name
from acip_export.errors import DeviceFileError
from acip_export.io.inputs import NotNegative, Positive, PositiveFloat, Share
from acip_export.io.outputs import claim_output, json_kind

SPEEDS_KIND = json_kind(SPEEDS.noun, SPEEDS.artifact)


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
        read: bytes of weights a second, by type, when one token is computed.
        compute: operations a second, by type, when a prompt is; a weight and a token are two.
        token_seconds, layer_seconds: of a token of an answer, and of each layer for it, whatever is read.
        width_seconds: of a token of a prompt, for each layer and each number of its width, beside its matrices.
        cache_read: bytes of a KV cache of the format's own type a second.
        attention: operations a second of a prompt's attention with such a cache.
        head_share: of a prompt's tokens, those for which the head is computed, as far as it shows.
        caches: the same of KV caches of other types, keys and values alike; of one that is not here, as of the own.
    """

    version: str
    read: Mapping[Name, PositiveFloat]
    compute: Mapping[Name, PositiveFloat]
    token_seconds: NotNegative
    layer_seconds: NotNegative
    width_seconds: NotNegative
    cache_read: PositiveFloat
    attention: PositiveFloat
    head_share: Share
    caches: Mapping[Name, CacheSpeed] = field(default_factory=dict)

    def cache(self, type: str) -> CacheSpeed:
        """Return the speeds of a cache of ``type``."""
        return self.caches.get(type) or CacheSpeed(self.cache_read, self.attention)


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
    """Read and check a table. Raises DeviceFileError."""
    return read_artifact(file, SpeedTable, DeviceFileError, "; make it with  acip-export calibrate")


def save_speeds(table: SpeedTable, file: Path, force: bool = True) -> None:
    """Write atomically; raises UsageError as :func:`acip_export.io.outputs.claim_output`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with claim_output(file, SPEEDS_KIND, force).new_file() as temporary:
        temporary.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
