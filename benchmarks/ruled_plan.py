"""Plans by rule and uniform scores, for measurements of writing and running: no budget is asked for or promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from acip_export.artifacts.plan import Certificate, Plan, Serving, TensorDecision
from acip_export.artifacts.scores import CurvePoint, ModuleScores, RankedModel, RankedOn, ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of


def ruled_plan(
    checkpoint: Checkpoint,
    fmt: str,
    layout: str,
    serving: Serving,
    tensors: tuple[TensorDecision, ...],
    files: Mapping[str, int] = MappingProxyType({}),
    adapters: bool = False,
) -> Plan:
    """A plan with these decisions, whose budget is the bytes of ``files`` if they are known."""
    total = sum(files.values())
    return Plan(
        format=fmt,
        layout=layout,
        task=task_of(checkpoint.config),
        model=checkpoint.name,
        model_fingerprint=checkpoint.fingerprint,
        scores_sha256="0" * 64,
        budget_bytes=total or 10**12,
        budget_scope="file",
        planned_bytes=total,
        memory_bytes=0,
        files=dict(files),
        breakdown={},
        predicted_loss=0.0,
        predicted_perplexity=None,
        size_ratio=1.0,
        adapters=adapters,
        serving=serving,
        certificate=Certificate(0, 0.0),
        tensors=tensors,
    )


def uniform_scores(
    checkpoint: Checkpoint,
    losses: Callable[[int], NDArray[np.float32]] = lambda count: np.ones(count, np.float32),
) -> ScoreFile:
    """Every column counts alike; ``losses(k)`` of the k components of a layer, by which they are ranked too."""
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        loss = losses(min(shape))
        moments = np.ones(shape[1], np.float32), np.ones(shape[0], np.float32)
        modules[name] = ModuleScores(shape, loss, loss, loss, loss, 1.0, *moments)
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "magnitude", "basis": "svd", "seed": 0},
        data=RankedOn(source="none", sha256="0" * 64, tokens=1),
        versions={"acip-export": version("acip-export")},
        curve=(CurvePoint(1.0, 3.0), CurvePoint(0.5, 4.0)),
        modules=modules,
        embedding_sensitivity={},
        second_moments={},
    )
