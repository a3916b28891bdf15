"""What plans were measured to lose before one of them was chosen: the cache beside a score file.

See docs/measured-losses.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from acip_export.artifacts.cache import FormatCache, load_cache
from acip_export.artifacts.names import PLAN_LOSSES, ArtifactName
from acip_export.io.atomic import keep
from acip_export.io.inputs import Count, Finite, NotNegative


@dataclass(frozen=True)
class PlanLoss:
    """Divergence from the dense model, nats per token. ``error``: its standard error."""

    measured: Finite
    error: NotNegative


@dataclass(frozen=True)
class PlanLosses(FormatCache):
    """Losses of plans of one score file and one format.

    Attributes:
        text_sha256: of the text that was measured on, and ``tokens`` how much of it: losses on more or less of it are
            others.
        plans: by :func:`acip_export.artifacts.plan.plan_sha256`.
    """

    NAME: ClassVar[ArtifactName] = PLAN_LOSSES

    text_sha256: str = ""
    tokens: Count = 0
    plans: Mapping[str, PlanLoss] = field(default_factory=dict)


def cache_file(scores: Path, format: str) -> Path:
    """``llama.acip`` -> ``llama.acip.candidates-gguf.json``."""
    return scores.with_name(f"{scores.name}.candidates-{format}.json")


def load_plan_losses(file: Path | None, nothing: PlanLosses) -> PlanLosses:
    """Return what is known; ``nothing`` where that is of another quantizer, score file, version or text."""
    known = nothing if file is None else load_cache(file, nothing)
    return known if (known.text_sha256, known.tokens) == (nothing.text_sha256, nothing.tokens) else nothing


def save_plan_losses(losses: PlanLosses, file: Path) -> None:
    """Write atomically, replacing what is there; a directory that cannot be written to is no error."""
    keep(file, (json.dumps(losses.to_json(), indent=1) + "\n").encode(), "plans are measured")
