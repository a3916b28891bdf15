"""The ranking stage: a model directory and text in, a score file out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn

from acip_export.artifacts.scores import (
    SCORES_KIND,
    FloatArray,
    ModuleScores,
    RankedModel,
    RankedOn,
    ScoreFile,
    save_scores,
)
from acip_export.errors import RankingError, UnsupportedError, UsageError
from acip_export.io.atomic import remove_leftovers
from acip_export.io.outputs import claim_output
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.components import pack_moment
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.opening import check_checkpoint
from acip_export.model.torch_model import transformers_config
from acip_export.ranking.acip_defaults import automatic_config
from acip_export.ranking.acip_run import AcipRun, advance
from acip_export.ranking.algorithms.first_order import first_order_changes, zero_sum_scores
from acip_export.ranking.algorithms.fisher import component_fisher
from acip_export.ranking.algorithms.spectral import training_free_scores
from acip_export.ranking.config import (
    TRAINING_FREE_BASES,
    AcipConfig,
    Algorithm,
    Basis,
    DataConfig,
    Precision,
    Predictor,
    ProgressCallback,
    Units,
    silent,
)
from acip_export.ranking.curve import adapter_pair, measure_curve
from acip_export.ranking.data import CalibrationData, is_self, read_data, sample_data
from acip_export.ranking.factorized_model import Factorized, factorize_model
from acip_export.ranking.load import checkpoint_activations, load_model
from acip_export.ranking.masked_linear import AdapterShape
from acip_export.ranking.out_of_memory import out_of_memory_named
from acip_export.ranking.processes import Processes, start_processes
from acip_export.ranking.run_state import RUN_KIND, Checkpoints, interrupts_between_steps, run_file
from acip_export.ranking.sharding import shard_dense
from acip_export.ranking.statistics import Statistics, collect_statistics
from acip_export.version import __version__

# A text is a few dozen tokens, a window hundreds.
_TEXTS_PER_WINDOW = 8


def rank_model(
    model: str | Path,
    data: str | Path,
    *,
    algorithm: Algorithm = "acip",
    units: Units = "singular",
    acip: AcipConfig | None = None,
    calibration: DataConfig | None = None,
    evaluation: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    gradient_checkpointing: bool | None = None,
    progress: ProgressCallback = silent,
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    checkpoint_every: int = 50,
    cache: Path | None = None,
) -> ScoreFile:
    """Rank the singular components of every linear layer of a causal language model or an encoder.

    Args:
        model: directory or Hugging Face id. data: what :func:`acip_export.text.documents.read_documents` reads, or
            ``self``: text sampled from the model.
        algorithm: ``acip``, or training-free: ``magnitude``, ``energy``, ``kfac``, ``fisher``, ``first-order``.
        units: what is ranked.
        acip: hyper-parameters of ``acip``; ``None`` for those of :func:`automatic_config`.
        device: of torch; ``auto``: a GPU where there is one.
        precision: see :func:`acip_export.ranking.load.load_model`. gradient_checkpointing: see
            :func:`acip_export.ranking.load.checkpoint_activations`.
        evaluation: text for the curve; ``None``: the end of ``data``, which nothing else then sees.
        out: where the score file is written, whole or not at all. While ``acip`` runs, its state is stored beside it
            (``NAME.acip.run``) every ``checkpoint_every`` steps and when it is interrupted; ``resume`` goes on from
            there to the ranking that the whole run would have given.
        cache: directory of factors (:mod:`acip_export.lowrank.cache`), read and filled.

    Raises:
        UsageError: unknown algorithm, or ``out`` may not be written. DataError, MissingExtraError: the text.
            CheckpointError, UnsupportedError: the model, or units that are not singular components. RankingError: the
            run diverged.
    """
    if algorithm != "acip" and algorithm not in TRAINING_FREE_BASES:
        known = ", ".join(["acip", *TRAINING_FREE_BASES])
        raise UsageError(f"unknown ranking algorithm {algorithm!r}; choose one of {known}")
    if units != "singular":
        raise UnsupportedError(
            f"units {units!r} cannot be ranked yet: no plan, bundle or converter knows layers of reduced width; "
            "rank singular components with  --units singular"
        )
    if out is not None:
        read = (data, evaluation, cache)
        claim_output(out, SCORES_KIND, force, read, model)
        claim_output(run_file(out), RUN_KIND, True, read, model)
    if resume and (out is None or algorithm != "acip"):
        raise UsageError("only a run of acip that writes a score file can be resumed; give  --out FILE")
    if checkpoint_every < 1:
        raise UsageError(f"a checkpoint every {checkpoint_every} steps is impossible; give at least 1")
    store = None if out is None else _Store(run_file(out), checkpoint_every, resume)
    calibration = calibration or DataConfig()
    processes = start_processes(device)
    checkpoint = Checkpoint.open(model)
    check_checkpoint(checkpoint)
    transformers_config(checkpoint.config)  # what transformers refuses, before a tokenizer is looked for
    if processes.mesh is not None and not checkpoint.shape.generates:
        raise UnsupportedError(f"{checkpoint.path} is an encoder, which fits on one device; launch with  --multi_gpu")
    config = (acip or automatic_config(checkpoint)) if algorithm == "acip" else None
    with out_of_memory_named(_what_to_lower(config, calibration, precision)):
        ranked = _rank(
            checkpoint,
            data,
            algorithm,
            config,
            calibration,
            evaluation,
            processes,
            precision,
            gradient_checkpointing,
            progress,
            store,
            FactorCache(cache),
        )
    if processes.is_main:
        if out is not None:
            save_scores(ranked, out, force)
        if out is not None and store is not None:
            store.file.unlink(missing_ok=True)
            remove_leftovers(store.file)
            remove_leftovers(out)
    processes.wait()
    return ranked


def _what_to_lower(config: AcipConfig | None, calibration: DataConfig, precision: Precision) -> str:
    batch = calibration.batch if config is None else config.batch
    advice = f"Lower  --batch (now {batch})  or  --context (now {calibration.context or 'the default'})"
    if config is not None:
        advice += ", add  --gradient-checkpointing"
    if precision != "model":
        advice += ", or store the weights as the model does with  --precision model"
    return f"{advice}. Checkpoints stored before are kept; --resume goes on from them where the settings allow"


def _rank(
    checkpoint: Checkpoint,
    data: str | Path,
    algorithm: Algorithm,
    config: AcipConfig | None,
    calibration: DataConfig,
    evaluation: str | Path | None,
    processes: Processes,
    precision: Precision,
    gradient_checkpointing: bool | None,
    progress: ProgressCallback,
    store: _Store | None,
    factors: FactorCache,
) -> ScoreFile:
    text = None if is_self(data) else read_data(checkpoint, data, calibration, evaluation)
    if text is not None and text.task.padding is not None:
        if config is not None and config.objective == "ce":
            raise UsageError("an encoder predicts no next token; its objective is  --objective distill")
        calibration = replace(calibration, batch=calibration.batch * _TEXTS_PER_WINDOW)
    dense = load_model(checkpoint, processes.device, precision, processes.home)
    if processes.mesh is not None:
        shard_dense(dense, checkpoint.linear_modules, processes.mesh)
    if text is None:
        text = sample_data(checkpoint, dense, calibration, evaluation, progress)
    with torch.random.fork_rng():
        torch.manual_seed(calibration.seed)
        statistics = collect_statistics(
            checkpoint, dense, text.statistics, calibration.batch, calibration.seed, progress, text.task, processes
        )
        if processes.mesh is not None:
            del dense  # what is sharded cannot get other layers
            dense = load_model(checkpoint, processes.device, precision, processes.home)
        stage = _Stage(checkpoint, dense, text, statistics, calibration, progress, store, processes, factors)
        if config is not None:
            checkpoint_activations(dense, checkpoint, gradient_checkpointing)
        ranking = stage.free(algorithm) if config is None else stage.learned(config)
        curve = measure_curve(
            dense,
            ranking.parts,
            ranking.scores,
            text.held_out,
            calibration.batch,
            calibration.curve_ratios,
            progress=progress,
            task=text.task,
            processes=processes,
        )
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=text.task.name,
        algorithm={
            "name": algorithm,
            **ranking.settings,
            **asdict(calibration),
            "context": text.training.shape[1],
        },
        data=RankedOn(
            source=text.text.source,
            sha256=text.text.sha256,
            documents=text.text.documents,
            tokens=text.text.tokens,
        ),
        versions={
            "acip-export": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        curve=curve,
        modules=_module_scores(checkpoint, ranking, statistics),
        embedding_sensitivity=statistics.embedding_sensitivity,
        second_moments={
            key: pack_moment(moment) for key, moment in {**statistics.inputs, **statistics.gradients}.items()
        },
    )


@dataclass(frozen=True)
class _Ranking:
    """Scores and the predictions behind them, by module, by component; ``settings`` go into the score file."""

    parts: Factorized
    drop_losses: Mapping[str, npt.NDArray[np.float64]]
    scores: Mapping[str, FloatArray]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Store:
    file: Path
    every: int
    resume: bool


@dataclass(frozen=True)
class _Stage:
    """What every algorithm starts from."""

    checkpoint: Checkpoint
    model: nn.Module
    text: CalibrationData
    statistics: Statistics
    calibration: DataConfig
    progress: ProgressCallback
    store: _Store | None
    processes: Processes
    factors: FactorCache

    def learned(self, config: AcipConfig) -> _Ranking:
        adapter = AdapterShape(
            config.adapter_rank, config.adapter_alpha, config.adapter_dropout, config.adapter_scaling
        )
        parts = self._factorize(config.basis, config.mask_scale, adapter)
        drop_losses = self._drop_losses(parts, config.predictor)
        run = AcipRun(
            self.model,
            parts.layers,
            drop_losses,
            self.text.training,
            config,
            self.calibration.seed,
            self.text.task,
            self.processes,
        )
        self._run(run, config)
        settings = {**asdict(config), "mask_steps": run.mask_steps, "tune_steps": run.tune_steps}
        return _Ranking(parts, drop_losses, run.scores(), settings)

    def _run(self, run: AcipRun, config: AcipConfig) -> None:
        """To the end, storing the run on the way and when it is interrupted."""
        context = self.text.training.shape[1]
        if self.store is None:
            for _ in advance(run, context, self.progress):
                pass
            return
        identity = self._identity(config, next(iter(run.layers.values())).up.dtype)
        checkpoints = Checkpoints(self.store.file, self.store.every, identity)
        if self.store.resume:
            checkpoints.load(run)
        stored = self.store.resume
        with interrupts_between_steps() as run.interrupted:
            try:
                for _ in advance(run, context, self.progress):
                    if run.should_stop() or (run.mask_steps + run.tune_steps) % checkpoints.every == 0:
                        checkpoints.save(run)
                        stored = True
                    if run.should_stop():
                        raise KeyboardInterrupt
            except RankingError as error:
                where = f"\nThe last good state is in {checkpoints.file}" if stored else ""
                raise RankingError(f"{error}{where}") from error

    def _identity(self, config: AcipConfig, dtype: torch.dtype) -> str:
        parts = [
            self.checkpoint.fingerprint,
            self.text.text.sha256,
            asdict(config),
            asdict(self.calibration),
            str(dtype),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def free(self, algorithm: Algorithm) -> _Ranking:
        basis = TRAINING_FREE_BASES[algorithm]
        parts = self._factorize(basis, 1.0, AdapterShape(0))
        drop_losses = self._drop_losses(parts, "fisher" if algorithm == "fisher" else "kfac")
        if algorithm == "first-order":
            windows, config = self.text.statistics, self.calibration
            changes = first_order_changes(
                self.model,
                parts.layers,
                windows,
                config.batch,
                config.seed,
                self.progress,
                self.text.task,
                self.processes,
            )
            scores = zero_sum_scores(changes, parts.singular)
        else:
            scores = training_free_scores(algorithm, parts.singular, drop_losses)
        return _Ranking(parts, drop_losses, scores, {"basis": basis})

    def _factorize(self, basis: Basis, mask_scale: float, adapter: AdapterShape) -> Factorized:
        return factorize_model(
            self.checkpoint,
            self.model,
            self.statistics,
            basis,
            mask_scale,
            adapter,
            self.progress,
            self.factors,
            self.processes,
        )

    def _drop_losses(self, parts: Factorized, predictor: Predictor) -> dict[str, npt.NDArray[np.float64]]:
        if predictor == "kfac":
            return {name: losses.drop.numpy() for name, losses in parts.losses.items()}
        windows, config = self.text.statistics, self.calibration
        batch_tokens = config.batch * windows.shape[1]
        return component_fisher(
            self.model,
            parts.layers,
            windows,
            batch_tokens,
            config.seed,
            self.progress,
            self.text.task,
            self.processes,
        )


def _module_scores(checkpoint: Checkpoint, ranking: _Ranking, statistics: Statistics) -> dict[str, ModuleScores]:
    parts = ranking.parts
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        layer, losses = parts.layers[name], parts.losses[name]
        b, a = (pair.float().cpu().numpy() for pair in adapter_pair(layer))
        adapted = a.shape[0] > 0
        modules[name] = ModuleScores(
            shape=shape,
            scores=ranking.scores[name],
            drop_loss=ranking.drop_losses[name].astype(np.float32),
            up_sensitivity=losses.up_sensitivity.float().numpy(),
            down_sensitivity=losses.down_sensitivity.float().numpy(),
            sensitivity=parts.sensitivity[name],
            input_moment=statistics.input_of(name).diagonal().float().numpy(),
            gradient_moment=statistics.gradient_of(name).diagonal().float().numpy(),
            input_key=statistics.input_keys[name],
            gradient_key=statistics.gradient_keys[name],
            adapter_a=a if adapted else None,
            adapter_b=b if adapted else None,
            adapter_scaling=layer.adapter_scaling,
        )
    return modules
