"""The ranking stage: a model directory and text in, a score file out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from acip_export.checkpoint import Checkpoint
from acip_export.errors import UsageError
from acip_export.factorize import pack_moment
from acip_export.files import refuse_existing
from acip_export.rank.acip import AcipRun, run_acip
from acip_export.rank.basis import Factorized, factorize_model
from acip_export.rank.config import (
    TRAINING_FREE_BASES,
    AcipConfig,
    Algorithm,
    DataConfig,
    ProgressCallback,
    silent,
)
from acip_export.rank.curve import adapter_pair, measure_curve
from acip_export.rank.data import read_data
from acip_export.rank.model import load_model
from acip_export.rank.parametrize import AdapterShape
from acip_export.rank.statistics import Statistics, collect_statistics
from acip_export.rank.training_free import training_free_scores
from acip_export.scores import FloatArray, ModuleScores, ScoreFile, save_scores
from acip_export.version import __version__

_SPEED = 8
_SMALL_BILLIONS = 0.1


def rank_model(
    model: str | Path,
    data: str | Path,
    *,
    algorithm: Algorithm = "acip",
    acip: AcipConfig | None = None,
    calibration: DataConfig | None = None,
    device: str = "cpu",
    progress: ProgressCallback = silent,
    out: Path | None = None,
    force: bool = False,
) -> ScoreFile:
    """Rank the singular components of every linear layer of a causal language model.

    Args:
        model: directory or Hugging Face id. data: text file, or directory of ``*.txt``.
        algorithm: ``acip``, or training-free: ``magnitude``, ``energy``, ``kfac``.
        acip: hyper-parameters of ``acip``; ``None`` for :func:`automatic_config`.
        out: where the score file is written, whole or not at all.

    Raises:
        UsageError: unknown algorithm, or ``out`` exists. DataError: the text. CheckpointError, UnsupportedError: the
            model. RankingError: the run diverged.
    """
    if algorithm != "acip" and algorithm not in TRAINING_FREE_BASES:
        known = ", ".join(["acip", *TRAINING_FREE_BASES])
        raise UsageError(f"unknown ranking algorithm {algorithm!r}; choose one of {known}")
    if out is not None:
        refuse_existing(out, force)
    checkpoint = Checkpoint.open(model)
    calibration = calibration or DataConfig()
    text = read_data(checkpoint, Path(data), calibration)
    dense = load_model(checkpoint, torch.device(device))
    with torch.random.fork_rng():
        torch.manual_seed(calibration.seed)
        statistics = collect_statistics(
            checkpoint, dense, text.statistics, calibration.batch, calibration.seed, progress
        )
        if algorithm == "acip":
            config = acip or automatic_config(checkpoint)
            settings: dict[str, Any] = asdict(config)
            adapter = AdapterShape(config.adapter_rank, config.adapter_alpha, config.adapter_dropout)
            parts = factorize_model(checkpoint, dense, statistics, config.basis, config.mask_scale, adapter, progress)
            drop_losses = {name: losses.drop.numpy() for name, losses in parts.losses.items()}
            run = AcipRun(dense, parts.layers, drop_losses, text.training, config, calibration.seed)
            run_acip(run, text.training.shape[1], progress)
            scores = run.scores()
            settings |= {"mask_steps": run.mask_steps, "tune_steps": run.tune_steps}
        else:
            settings = {"basis": TRAINING_FREE_BASES[algorithm]}
            parts = factorize_model(checkpoint, dense, statistics, TRAINING_FREE_BASES[algorithm], progress=progress)
            drop_losses = {name: losses.drop.numpy() for name, losses in parts.losses.items()}
            scores = training_free_scores(algorithm, parts.singular, drop_losses)
        curve = measure_curve(
            dense, parts.layers, scores, parts.whitenings, text.held_out, calibration.batch, progress=progress
        )
    ranked = ScoreFile(
        model={"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        algorithm={"name": algorithm, **settings, **asdict(calibration), "context": text.training.shape[1]},
        data={"source": text.text.source, "sha256": text.text.sha256, "tokens": text.text.tokens},
        versions={
            "acip-export": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        curve=curve,
        modules=_module_scores(checkpoint, parts, statistics, scores),
        embedding_sensitivity=statistics.embedding_sensitivity,
        second_moments={
            key: pack_moment(moment) for key, moment in {**statistics.inputs, **statistics.gradients}.items()
        },
    )
    if out is not None:
        save_scores(ranked, out, force)
    return ranked


def automatic_config(checkpoint: Checkpoint) -> AcipConfig:
    """The settings that rank ``checkpoint`` well in minutes rather than the paper's hours.

    A small model's run is ``_SPEED`` times as fast: the learning rate is multiplied by it, and the growth of the
    penalty per step raised to it, so that masks and penalty cover the paper's distances in fewer steps.
    """
    billions = sum(out * inputs for out, inputs in checkpoint.linear_modules.values()) / 1e9
    speed = _SPEED if billions < _SMALL_BILLIONS else 1
    paper = AcipConfig()
    return replace(
        paper,
        basis="kfac",
        start="drop-loss",
        post_tune_sizes="sampled",
        post_tune=100 if speed > 1 else paper.post_tune,
        learning_rate=paper.learning_rate * speed,
        penalty_growth=paper.penalty_growth**speed,
        batch=2 if speed > 1 else paper.batch,
    )


def _module_scores(
    checkpoint: Checkpoint, parts: Factorized, statistics: Statistics, scores: Mapping[str, FloatArray]
) -> dict[str, ModuleScores]:
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        layer, losses = parts.layers[name], parts.losses[name]
        b, a = (pair.float().cpu().numpy() for pair in adapter_pair(layer))
        adapted = a.shape[0] > 0
        modules[name] = ModuleScores(
            shape=shape,
            scores=scores[name],
            drop_loss=losses.drop.float().numpy(),
            up_sensitivity=losses.up_sensitivity.float().numpy(),
            down_sensitivity=losses.down_sensitivity.float().numpy(),
            sensitivity=parts.sensitivity[name],
            input_moment=statistics.input_of(name).diagonal().float().numpy(),
            gradient_moment=statistics.gradient_of(name).diagonal().float().numpy(),
            input_key=statistics.input_keys[name],
            gradient_key=statistics.gradient_keys[name],
            adapter_a=a if adapted else None,
            adapter_b=b if adapted else None,
        )
    return modules
