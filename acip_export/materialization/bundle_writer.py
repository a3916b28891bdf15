"""Writes the bundle, one tensor at a time: peak memory is a small multiple of the largest layer, not of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from acip_export.artifacts.bundle import BUNDLE_KIND, Manifest
from acip_export.artifacts.materialized import stored_of
from acip_export.artifacts.names import (
    CONFIG_FILE,
    FEEDBACK_FILE,
    IMPORTANCE_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
)
from acip_export.artifacts.plan import Plan, TensorDecision, dumps_plan, numbers_sha256
from acip_export.artifacts.scores import ScoreFile
from acip_export.io.atomic import SafetensorsWriter, sha256_of
from acip_export.io.frozen import thawed
from acip_export.io.outputs import claim_output, sizes_below
from acip_export.io.prefetch import one_ahead
from acip_export.materialization.feedback_factors import FeedbackWriter
from acip_export.materialization.plan_numbers import Stored
from acip_export.materialization.planned_model import PlannedModel
from acip_export.model.checkpoint import TOKENIZER_FILES, Checkpoint
from acip_export.model.encoder import sentence_files
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.rounding.kept_roundings import KeptRoundings, roundings_beside
from acip_export.rounding.quantizer import RoundTrip, origin_of
from acip_export.version import __version__


def materialize_bundle(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: ProgressCallback = silent,
    round_trip: RoundTrip | None = None,
    cache: Path | None = None,
    feedback_types: Collection[str] = (),
    quantizer: str = "",
    kept: KeptRoundings | None = None,
) -> Path:
    """Write the bundle of ``plan`` into the directory ``out``, whole or not at all.

    Pairs and factors of error feedback that a killed run has made for it are not made again. Dense tensors are copied
    again: what was kept of them would have to be read and compared just as they are.

    Args:
        round_trip, cache, feedback_types: as :class:`~acip_export.materialization.planned_model.PlannedModel`.
        quantizer: name and version of ``round_trip``. kept: of an export that the bundle is written for; ``None``:
            what a killed run has left beside ``out``.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        ScoreFileError, PlanFileError: they do not belong to this model.
        CheckpointError: a weight is damaged or not finite.
    """
    output = claim_output(out, BUNDLE_KIND, force, (scores.file, cache, *plan.options.values()), checkpoint.path)
    origin = origin_of([quantizer], scores.sha256, numbers_sha256(plan))
    with (
        output.held(),
        roundings_beside(output.place, origin) if kept is None else nullcontext(kept) as parts,
        output.new_directory() as directory,
    ):
        model = PlannedModel(checkpoint, scores, plan, round_trip, cache, feedback_types, kept=parts)
        numbers, importance = model.numbers, dict[str, Tensor]()
        declared = {
            name: (numbers.dtype(decision), shape)
            for decision in plan.tensors
            for name, shape in stored_of(decision).items()
        }
        with (
            SafetensorsWriter(directory / WEIGHTS_FILE, declared, {"format": "pt"}) as writer,
            FeedbackWriter(directory / FEEDBACK_FILE, plan, numbers.matrices, numbers.rows) as feedback_writer,
        ):
            for index, (decision, made) in enumerate(one_ahead(partial(_stored, model), plan.tensors)):
                for name, tensor in made.numbers.items():
                    writer.write(name, tensor.contiguous().view(torch.uint8).numpy().data)
                importance |= made.importance
                feedback_writer.write(decision, model)
                progress(Progress("materialize", index + 1, len(plan.tensors), decision.name))
        checkpoint.check_unchanged()
        _save_importance(importance, directory / IMPORTANCE_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(thawed(checkpoint.config), indent=2), encoding="utf-8")
        for name in (*TOKENIZER_FILES, *sentence_files(checkpoint.path)):
            if (checkpoint.path / name).is_file():
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.path / name, directory / name)
        (directory / PLAN_FILE).write_text(dumps_plan(plan), encoding="utf-8")
        manifest = Manifest(
            tool=__version__,
            model=plan.model,
            model_fingerprint=checkpoint.fingerprint,
            scores_sha256=scores.sha256,
            source_dtype=source_dtype(checkpoint),
            weights_sha256=writer.sha256,
            importance_sha256=sha256_of(directory / IMPORTANCE_FILE),
            feedback_sha256=feedback_writer.sha256,
            feedback=numbers.matrices,
            row_feedback=numbers.rows,
            files=sizes_below(directory),
        )
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    return out


def _stored(model: PlannedModel, decision: TensorDecision) -> Stored:
    names = list(stored_of(decision))
    numbers = {name: model.read(name) for name in names}
    known = ((name, model.importance(name)) for name in names)
    return Stored(numbers, {name: importance for name, importance in known if importance is not None})


def source_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors dtype that most bytes of the model have."""
    totals: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def _save_importance(importance: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    # Modules that share an input share its moments; safetensors refuses shared memory.
    save_file({name: tensor.clone() for name, tensor in importance.items()}, file)
