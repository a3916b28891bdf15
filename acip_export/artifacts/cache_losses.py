"""What each type of KV cache costs, measured in the runtime: the cache beside a score file. See docs/memory.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from acip_export.artifacts.cache import FormatCache, load_cache
from acip_export.artifacts.names import CACHE_LOSSES, ArtifactName
from acip_export.artifacts.plan import Serving
from acip_export.io.atomic import keep
from acip_export.io.inputs import Count, NotNegative


@dataclass(frozen=True)
class CacheLosses(FormatCache):
    """Divergence from the same export with the format's own type of KV cache, nats per token.

    Attributes:
        text_sha256: of the text that was measured on, and ``tokens`` how much of it.
        keys, values: by type, of keys alone and of values alone.
    """

    NAME: ClassVar[ArtifactName] = CACHE_LOSSES

    text_sha256: str = ""
    tokens: Count = 0
    keys: Mapping[str, NotNegative] = field(default_factory=dict)
    values: Mapping[str, NotNegative] = field(default_factory=dict)

    def loss(self, serving: Serving) -> float | None:
        """Return what the cache of ``serving`` costs, the sum of both sides; ``None``: it was not measured."""
        keys, values = self.keys.get(serving.cache_type_k), self.values.get(serving.cache_type_v)
        return None if keys is None or values is None else keys + values


def cache_file(scores: Path, format: str) -> Path:
    """``llama.acip`` -> ``llama.acip.kv-cache-gguf.json``."""
    return scores.with_name(f"{scores.name}.kv-cache-{format}.json")


def load_cache_losses(scores: Path | None, nothing: CacheLosses) -> CacheLosses:
    """Return what is known; ``nothing`` where that is of another runtime, score file or version."""
    return nothing if scores is None else load_cache(cache_file(scores, nothing.format), nothing)


def save_cache_losses(losses: CacheLosses, scores: Path) -> None:
    """Write atomically, replacing what is there; a directory that cannot be written to is no error."""
    text = json.dumps(losses.to_json(), indent=1) + "\n"
    keep(cache_file(scores, losses.format), text.encode(), "KV cache types are measured")
