"""What is made from a score file beside plans: its summary, and llama.cpp's importance matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from acip_export.artifacts.scores import ScoreFile
from acip_export.io.inputs import builtins
from acip_export.io.outputs import claim_output
from acip_export.model.checkpoint import Checkpoint


def ranking_summary(scores: ScoreFile) -> dict[str, Any]:
    """What a score file says about itself, ready for JSON."""
    return {
        "model": builtins(scores.model),
        "task": scores.task,
        "algorithm": dict(scores.algorithm),
        "data": builtins(scores.data),
        "curve": builtins(scores.curve),
    }


def write_imatrix(checkpoint: Checkpoint, scores: ScoreFile, out: Path, force: bool = False) -> int:
    """Write the input moments of ``scores`` as llama.cpp's importance matrix; returns how many matrices it has.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        ScoreFileError: of another model.
        UnsupportedError: an architecture whose tensors have no known names in llama.cpp.
    """
    from converters.gguf import imatrix

    claim_output(out, imatrix.IMATRIX_KIND, force, (scores.file,), checkpoint.path)
    scores.check_model(checkpoint)
    moments = {name: module.input_moment for name, module in scores.modules.items()}
    tokens = scores.moment_tokens() or 1
    chunk = min(scores.ranked_by.context or tokens, tokens)
    measured = imatrix.Measured(scores.data.source, tokens, chunk)
    return imatrix.write_imatrix(checkpoint, moments, measured, out, force)


def rounding_scores(checkpoint: Checkpoint, scores: ScoreFile) -> ScoreFile:
    """``scores`` with the importance of the inputs that the user named in place of its own; the same file otherwise."""
    file = checkpoint.options.get("imatrix")
    if file is None:
        return scores
    from converters.gguf.imatrix import importance_of

    scores.check_model(checkpoint)
    given = importance_of(checkpoint, Path(file))
    weighted = {name: replace(scores.modules[name], input_moment=moment) for name, moment in given.items()}
    return replace(scores, modules={**scores.modules, **weighted})
