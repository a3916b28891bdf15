"""Plans by rule, for measurements of writing and running: no budget was asked for, so none is promised."""

from __future__ import annotations

from acip_export.checkpoint import Checkpoint
from acip_export.plans import Certificate, Plan, Runtime, TensorDecision


def ruled_plan(
    checkpoint: Checkpoint, target: str, layout: str, runtime: Runtime, tensors: tuple[TensorDecision, ...]
) -> Plan:
    """A plan with these decisions."""
    return Plan(
        target=target,
        layout=layout,
        model=checkpoint.name,
        model_fingerprint=checkpoint.fingerprint,
        scores_sha256="0" * 64,
        budget_bytes=10**12,
        budget_scope="file",
        planned_bytes=0,
        memory_bytes=0,
        files={},
        breakdown={},
        predicted_loss=0.0,
        predicted_perplexity=None,
        size_ratio=1.0,
        adapters=False,
        runtime=runtime,
        certificate=Certificate(0, 0.0),
        tensors=tensors,
    )
