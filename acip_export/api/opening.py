"""Open what users name: a model and a score file, by path, by id, or opened already."""

from __future__ import annotations

import os
from pathlib import Path

from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile, find_scores, load_scores
from acip_export.errors import CheckpointError
from acip_export.model.checkpoint import Checkpoint

Location = str | os.PathLike[str]


def open_model(model: Location | Checkpoint, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Open a model directory or a Hugging Face id; an opened one stays as it is.

    Raises:
        CheckpointError: not a model directory, or an id that cannot be fetched.
    """
    if isinstance(model, Checkpoint):
        return model
    return Checkpoint.open(os.fspath(model), revision=revision, token=token)


def open_scores(checkpoint: Checkpoint, scores: Location | ScoreFile | None) -> ScoreFile:
    """Open a score file; ``None``: the only one beside the model.

    Raises:
        ScoreFileError: none, several, or a damaged one.
    """
    if isinstance(scores, ScoreFile):
        return scores
    return load_scores(find_scores(checkpoint.path) if scores is None else Path(scores))


def another_model(checkpoint: Checkpoint, plan: Plan) -> CheckpointError:
    """Return the error for a model that an export was not made of."""
    return CheckpointError(
        f"{checkpoint.path} ({checkpoint.fingerprint[:12]}…) is not the model of this export, {plan.model} "
        f"({plan.model_fingerprint[:12]}…); name that one with  --model"
    )
