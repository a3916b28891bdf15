"""What a user has to know about every export of a model, whatever its format: what runtimes leave to the caller."""

from __future__ import annotations

from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import sentence_settings
from acip_export.model.rope import rope_fields


def model_notes(checkpoint: Checkpoint, context: int) -> tuple[str, ...]:
    """Return a sentence for each.

    Args:
        context: tokens that are served.
    """
    notes = []
    if checkpoint.shape.generates:
        rope = rope_fields(checkpoint.config)
        original = rope["original_max_position_embeddings"]
        if "long_factor" in rope and original and context > int(original):
            notes.append(
                f"its positions have two sets of factors (longrope): with a context of {context} texts of up to "
                f"{original} tokens are computed with those of long texts, where transformers takes those of short "
                f"ones; for the model's own answers to short texts export with  --context {original}"
            )
        return tuple(notes)
    settings = sentence_settings(checkpoint.path)
    width = checkpoint.shape.hidden
    if settings.truncate_dim is not None and settings.truncate_dim < width:
        notes.append(
            f"sentence-transformers cuts embeddings to their first {settings.truncate_dim} numbers (truncate_dim); "
            f"exports give all {width}: cut them, and bring what is left to unit length"
        )
    if settings.default_prompt:
        notes.append(
            f"sentence-transformers puts {settings.default_prompt!r} before every text (default_prompt_name); "
            "runtimes do not: put it there"
        )
    return tuple(notes)
