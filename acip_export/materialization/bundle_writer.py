"""Writes the bundle, one tensor at a time: peak memory is a small multiple of the largest layer, not of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from acip_export.artifacts.bundle import BUNDLE_KIND, Manifest, check_context, stored_of, stored_tensors
from acip_export.artifacts.names import (
    CONFIG_FILE,
    FEEDBACK_FILE,
    IMPORTANCE_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
)
from acip_export.artifacts.plan import Plan, TensorDecision, dumps_plan
from acip_export.artifacts.scores import ModuleScores, ScoreFile
from acip_export.errors import CheckpointError, PlanFileError, ScoreFileError
from acip_export.io.atomic import SafetensorsWriter, sha256_of
from acip_export.io.frozen import thawed
from acip_export.io.outputs import claim_output, sizes_below
from acip_export.io.prefetch import one_ahead
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization.channel_scales import ScaledCheckpoint, scale_channels
from acip_export.materialization.factors import Norm, Pair, basis_moments, dense_weight, factor_pair, inner_importance
from acip_export.materialization.feedback import (
    FeedbackFactors,
    FeedbackWriter,
    matrices_with_feedback,
    second_moment,
)
from acip_export.materialization.refit import balanced, refit
from acip_export.materialization.residual import correct
from acip_export.model.checkpoint import TOKENIZER_FILES, Checkpoint
from acip_export.model.encoder import sentence_files
from acip_export.progress import Progress, ProgressCallback, silent
from acip_export.rounding import InputMoments, RoundTrip
from acip_export.version import __version__
from acip_export.weight_types import weight_type


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
) -> Path:
    """Write the bundle of ``plan`` into the directory ``out``, whole or not at all.

    Args:
        round_trip: the quantizer of the plan's format; factor pairs are then fitted to what it makes of them. ``None``
            leaves them as the ranking has them.
        cache: directory of factors (:mod:`acip_export.lowrank.cache`), read and filled.
        feedback_types: of the plan's format, those that it can round with error feedback. Where the plan asks for it,
            the bundle gets what that needs to know about the inputs.

    Raises:
        UsageError: ``out`` may not be written; see :func:`acip_export.io.outputs.claim_output`.
        ScoreFileError, PlanFileError: they do not belong to this model.
        CheckpointError: a weight is damaged or not finite.
    """
    output = claim_output(out, BUNDLE_KIND, force, (scores.file, cache, *plan.options.values()), checkpoint.path)
    scores.check_model(checkpoint)
    check_plan(checkpoint, plan)
    importance: dict[str, Tensor] = {}
    factors = FactorCache(cache)
    read, origin = checkpoint, scores.sha256
    if plan.rounding == "feedback" and feedback_types:
        read, scores = scale_channels(checkpoint.with_options(plan.options), scores, plan)
    matrices = matrices_with_feedback(plan, scores, feedback_types)
    feedback = FeedbackFactors(scores)
    with output.new_directory() as directory:
        declared = {
            name: (_stored_dtype(read, scores, plan, decision), shape)
            for decision in plan.tensors
            for name, shape in stored_of(decision).items()
        }
        with (
            SafetensorsWriter(directory / WEIGHTS_FILE, declared, {"format": "pt"}) as writer,
            FeedbackWriter(directory / FEEDBACK_FILE, plan, matrices) as feedback_writer,
        ):
            made = one_ahead(
                lambda decision: stored_numbers(
                    read, scores, plan, decision, round_trip, importance, factors, feedback, matrices
                ),
                plan.tensors,
            )
            for index, (decision, numbers) in enumerate(made):
                for name, tensor in numbers.items():
                    writer.write(name, tensor.contiguous().view(torch.uint8).numpy().data)
                feedback_writer.write(decision, feedback)
                progress(Progress("materialize", index + 1, len(plan.tensors), decision.name))
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
            scores_sha256=origin,
            source_dtype=source_dtype(checkpoint),
            weights_sha256=writer.sha256,
            importance_sha256=sha256_of(directory / IMPORTANCE_FILE),
            feedback_sha256=feedback_writer.sha256,
            feedback=matrices,
            files=sizes_below(directory),
        )
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    return out


def check_plan(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises PlanFileError unless the plan decides every tensor of this model, in its shape."""
    if plan.model_fingerprint != checkpoint.fingerprint:
        raise PlanFileError(f"the plan was made for {plan.model!r}, not for {checkpoint.path}; plan again")
    decided = {decision.name: decision.shape for decision in plan.tensors}
    expected = {name: info.shape for name, info in checkpoint.tensors.items()}
    if decided != expected:
        different = sorted(n for n in decided.keys() | expected.keys() if decided.get(n) != expected.get(n))
        raise PlanFileError(f"the plan does not fit {checkpoint.path}: {different[0]} differs; plan again")
    check_context(plan, checkpoint)


def source_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors dtype that most bytes of the model have."""
    totals: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def _has_adapter(scores: ScoreFile, plan: Plan, decision: TensorDecision) -> bool:
    """Whether a dense weight is changed by one."""
    module = scores.modules.get(decision.module)
    return plan.adapters and module is not None and module.adapter(len(module.scores)) is not None


def _stored_dtype(checkpoint: Checkpoint, scores: ScoreFile, plan: Plan, decision: TensorDecision) -> str:
    scaled = isinstance(checkpoint, ScaledCheckpoint) and decision.name in checkpoint.scaled
    exact = decision.rank is None and not scaled and not _has_adapter(scores, plan, decision)
    return checkpoint.tensors[decision.name].dtype if exact else "F32"


def stored_numbers(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    plan: Plan,
    decision: TensorDecision,
    round_trip: RoundTrip | None,
    importance: dict[str, Tensor],
    factors: FactorCache,
    feedback: FeedbackFactors,
    matrices: Mapping[str, str],
) -> dict[str, Tensor]:
    """Make what the bundle stores of a decision, by name; ``importance`` learns what rounding may know of inputs."""
    weight = checkpoint.read(decision.name)
    if not _finite(weight):
        raise CheckpointError(f"{checkpoint.path}: {decision.name} holds NaN or infinity")
    module = scores.modules.get(decision.module) if decision.name.endswith(".weight") else None
    if decision.rank is not None and scores.slim:
        raise ScoreFileError(
            f"{decision.name} is to be factored, and the score file is slim: it has no second moments for that.\n"
            f"Make one that has:  {scores.whole_again}"
        )
    if decision.representation == "residual" and decision.rank is not None and module is not None:
        return _residual(
            plan.format,
            weight,
            dense_weight(weight, module, plan.adapters).float(),
            module,
            scores,
            decision,
            round_trip,
            importance,
            feedback,
            matrices,
        )
    if decision.rank is None or module is None or decision.kept is None:
        if decision.rank is not None:
            raise PlanFileError(f"{decision.name} is to be factored, but was never ranked; plan again")
        if module is not None:
            importance[decision.name] = torch.from_numpy(module.input_moment)
        elif decision.name in matrices:
            importance[decision.name] = second_moment(scores, matrices[decision.name]).diagonal().float()
        return {decision.name: dense_weight(weight, module, plan.adapters)}
    pair = factor_pair(weight, module, basis_moments(scores, module, weight), decision.kept, plan.adapters, factors)
    up, down = stored_tensors(decision.name, decision.shape, decision.rank)
    importance[down] = torch.from_numpy(module.input_moment)
    norm = Norm.of(module, scores.second_moments, weight)
    formats = [weight_type(plan.format, name or "") for name in (decision.up_type, decision.down_type)]
    if round_trip is None or all(form.is_float for form in formats):
        importance[up] = inner_importance(pair.down, norm.inputs)
        return {up: pair.up, down: pair.down}
    inputs = InputMoments(importance[down], feedback.of(module) if down in matrices else None)
    fitted = refit(balanced(pair, norm), norm, inputs, formats[0], formats[1], round_trip)
    importance[up] = fitted.up_importance
    return {up: fitted.pair.up, down: fitted.pair.down}


def _finite(weight: Tensor) -> bool:
    # NaN and infinity are extremes. torch.isfinite takes ten times as long, and makes copies 2.5 times as large.
    return weight.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight))


def _residual(
    file_format: str,
    ranked: Tensor,
    weight: Tensor,
    module: ModuleScores,
    scores: ScoreFile,
    decision: TensorDecision,
    round_trip: RoundTrip | None,
    importance: dict[str, Tensor],
    feedback: FeedbackFactors,
    matrices: Mapping[str, str],
) -> dict[str, Tensor]:
    assert decision.rank is not None
    up, down = stored_tensors(decision.name, decision.shape, decision.rank)
    importance[decision.name] = importance[down] = torch.from_numpy(module.input_moment)
    norm = Norm.of(module, scores.second_moments, ranked)
    whitenings = Whitening.of(norm.inputs), Whitening.of(norm.gradients)
    if round_trip is None:
        basis = whitened_components(weight, *whitenings)
        pair = Pair(basis.up[:, : decision.rank], basis.down[: decision.rank])
        importance[up] = inner_importance(pair.down, norm.inputs)
        return {up: pair.up, down: pair.down, decision.name: weight - pair.up @ pair.down}
    types = (decision.type, decision.up_type, decision.down_type)
    base, *formats = (weight_type(file_format, name or "") for name in types)
    informed = not matrices.keys().isdisjoint((decision.name, down))
    inputs = InputMoments(importance[down], feedback.of(module) if informed else None)
    found = correct(weight, norm, whitenings, inputs, base, decision.rank, (formats[0], formats[1]), round_trip)
    importance[up] = found.up_importance
    return {up: found.pair.up, down: found.pair.down, decision.name: found.base}


def _save_importance(importance: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    # Modules that share an input share its moments; safetensors refuses shared memory.
    save_file({name: tensor.clone() for name, tensor in importance.items()}, file)
