"""Rank: a model directory and text in, a score file out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from acip_export.artifacts.scores import (
    SCORES_KIND,
    CurvePoint,
    ModuleScores,
    RankedModel,
    RankedOn,
    ScoreFile,
    rounded,
    save_scores,
)
from acip_export.errors import UnsupportedError, UsageError
from acip_export.io.atomic import remove_leftovers
from acip_export.io.outputs import claim_output
from acip_export.lowrank.cache import FactorCache
from acip_export.lowrank.moments import PackedMoment
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.opening import check_checkpoint
from acip_export.model.torch_model import transformers_config
from acip_export.progress import ProgressCallback, silent
from acip_export.ranking.acip_defaults import automatic_config, default_algorithm
from acip_export.ranking.algorithm import Algorithm, Ranking
from acip_export.ranking.algorithms import find_algorithm, learned_algorithms
from acip_export.ranking.config import AcipConfig, DataConfig, Precision
from acip_export.ranking.context import RankContext
from acip_export.ranking.curve import adapter_pair, measure_curve
from acip_export.ranking.data import is_self, read_data, sample_data
from acip_export.ranking.factorized_model import Factorized, factorize_model
from acip_export.ranking.fitted_before import FittedSettings, asked_for, fitted_before
from acip_export.ranking.fitting import Beside, Fitted, Limits, fit_ranking, nothing_beside
from acip_export.ranking.kept_ranking import origin_of, ranking_work
from acip_export.ranking.load import enable_recomputation, linear_weights, load_model
from acip_export.ranking.masked_linear import AdapterShape
from acip_export.ranking.out_of_memory import out_of_memory_named
from acip_export.ranking.processes import launch_note, lost_process_named, start_processes
from acip_export.ranking.run_state import RUN_KIND, RunStates, run_file
from acip_export.ranking.sharding import shard_dense
from acip_export.ranking.statistics import Statistics, collect_statistics
from acip_export.text.documents import check_documents
from acip_export.version import __version__

logger = logging.getLogger(__name__)

# A text is a few dozen tokens, a window hundreds.
_TEXTS_PER_WINDOW = 8


def rank_model(
    model: str | Path,
    data: str | Path,
    *,
    algorithm: str | None = None,
    acip: AcipConfig | None = None,
    calibration: DataConfig | None = None,
    evaluation: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    recompute_activations: bool | None = None,
    progress: ProgressCallback = silent,
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    store_seconds: float = 120.0,
    cache: Path | None = None,
    slim: bool = False,
    seconds: float | None = None,
    memory: int | None = None,
    beside: Beside = nothing_beside,
    announce: Callable[[str], None] = logger.info,
    estimated: Callable[[Fitted], None] = lambda _fitted: None,
) -> ScoreFile:
    """Rank the singular components of every linear layer of a causal language model or an encoder.

    Args:
        model: directory or Hugging Face id. data: what :func:`acip_export.text.documents.read_documents` reads, or
            ``self``: text sampled from the model.
        algorithm: the name of one of :mod:`acip_export.ranking.algorithms`; ``None``: see
            :func:`acip_export.ranking.acip_defaults.default_algorithm`.
        acip: hyper-parameters of an algorithm that learns; ``None`` for those of :func:`automatic_config`.
        device: of torch; ``auto``: a GPU where there is one.
        precision: see :func:`acip_export.ranking.load.load_model`. recompute_activations: see
            :func:`acip_export.ranking.load.enable_recomputation`.
        evaluation: text for the curve; ``None``: the end of ``data``, which nothing else then sees.
        out: where the score file is written, whole or not at all. While an algorithm learns, its state is stored
            beside it (``NAME.acip.run``), so that no more than ``store_seconds`` of it are lost however it ends;
            ``resume`` goes on from there to the ranking that the whole run would have given. Whatever else takes long
            is kept beside it, too (``.NAME.acip.rank-state``): the same call goes on with that by itself. Every process
            keeps its own; as many have to be started again.
        slim: leave second moments out: see :meth:`ScoreFile.without_moments`.
        cache: directory of factors (:mod:`acip_export.lowrank.cache`), read and filled.
        seconds, memory: what the ranking may take; it uses fewer tokens, windows and steps to stay within them.
        beside: what follows the ranking; its time counts as well.
        announce: is told what the ranking takes before it starts, and what was changed to fit. estimated: is told the
            figures, where there are any: of one process on processors.

    Raises:
        InfeasibleBudgetError: more memory than there is. OutputError: more disk.
        UsageError: unknown algorithm, or ``out`` may not be written. DataError, MissingExtraError: the text.
            CheckpointError, UnsupportedError: the model. RankingError: the run diverged.
    """
    unsaid = algorithm is None
    if algorithm is not None:
        find_algorithm(algorithm)
    output = None
    if out is not None:
        read = (data, evaluation, cache)
        output = claim_output(out, SCORES_KIND, force, read, model)
        claim_output(run_file(out), RUN_KIND, True, read, model)
    if algorithm is None:
        algorithm = default_algorithm(Checkpoint.open(model), device, acip, resume, seconds)
    chosen = find_algorithm(algorithm)
    if acip is not None and not chosen.learns:
        raise UsageError(f"{algorithm} has no settings; leave them out, or rank with {learned_algorithms()}")
    if resume and (out is None or not chosen.learns):
        raise UsageError(f"only a run of {learned_algorithms()} that writes a score file can be resumed; give  --out")
    if store_seconds < 0:
        raise UsageError(f"a run state every {store_seconds} seconds is impossible; give 0 for one after every step")
    for source in (data, evaluation):
        if source is not None and not is_self(source):
            check_documents(source)
    processes = start_processes(device)
    checkpoint = Checkpoint.open(model)
    check_checkpoint(checkpoint)
    transformers_config(checkpoint.config)  # what transformers refuses, before a tokenizer is looked for
    if processes.mesh is not None and not checkpoint.shape.generates:
        raise UnsupportedError(f"{checkpoint.path} is an encoder, which fits on one device; launch with  --multi_gpu")
    calibration = (calibration or DataConfig()).for_weights(linear_weights(checkpoint))
    acip = (acip or automatic_config(checkpoint)) if chosen.learns else None
    announced = launch_note(processes)
    if announced:
        announce(announced)
    if unsaid and not chosen.learns:
        announce(
            f"{algorithm} trains nothing. Learning makes factor pairs better, in as much time as you give it:  "
            "--time 20min;  all of its steps take hours on processors:  --algorithm acip"
        )
    settings, asked, before = "", "", None
    if seconds is not None or memory is not None:
        asked = asked_for(chosen.name, acip, calibration, seconds, memory)
        before = None if out is None else fitted_before(out.absolute(), run_file(out), asked)
        if resume and seconds is not None and before is None:
            raise UsageError(
                "a run goes on with the settings that it had, and none that was fitted to this time is kept; leave out "
                "the time, or  --resume"
            )
    if before is not None:
        chosen, acip, calibration = find_algorithm(before.algorithm), before.acip, before.calibration
        settings = before.text()
        announce(f"ranking with {chosen.name}, with the settings that an earlier run has fitted to what there is")
    elif processes.count == 1 and processes.device.type == "cpu":
        limits = Limits.of(seconds, memory, out)
        fitted = fit_ranking(checkpoint, chosen, acip, calibration, limits, beside=beside, precision=precision)
        chosen, acip, calibration = fitted.algorithm, fitted.acip, fitted.calibration
        estimated(fitted)
        for line in (fitted.summary(), *fitted.changes):
            announce(line)
        if limits.asked:
            settings = FittedSettings(asked, chosen.name, acip, calibration).text()
    elif seconds is not None or memory is not None:
        raise UnsupportedError("a ranking fits itself to time and memory in one process on processors; leave them out")
    load = partial(load_model, checkpoint, processes.device, precision, processes.home)
    wanted = chosen.fisher and (acip is None or acip.predictor == "fisher")
    with ExitStack() as stack, lost_process_named():
        if output is not None and processes.is_main:
            stack.enter_context(output.held())
        with out_of_memory_named(_what_to_lower(acip, calibration, precision)):
            text = None if is_self(data) else read_data(checkpoint, data, calibration, evaluation)
            if text is not None and not text.task.labelled:
                if acip is not None and acip.objective == "ce":
                    raise UsageError("an encoder predicts no next token; its objective is  --objective distill")
                calibration = replace(calibration, batch=calibration.batch * _TEXTS_PER_WINDOW)
            dense = load()
            basis = chosen.basis if acip is None else acip.basis
            origin = origin_of(checkpoint, dense, text, calibration, basis, wanted, processes, precision)
            work = stack.enter_context(ranking_work(out, processes, origin, settings))
            if processes.mesh is not None:
                shard_dense(dense, checkpoint.linear_modules, processes.mesh)
            context = RankContext(
                checkpoint=checkpoint,
                model=dense,
                data=text or sample_data(checkpoint, dense, calibration, evaluation, progress, work),
                calibration=calibration,
                processes=processes,
                progress=progress,
                factors=FactorCache(cache),
                acip=acip,
                run_states=None if out is None else RunStates(run_file(out), store_seconds, resume, settings),
                work=work,
            )
            del dense  # the context has it alone
            with torch.random.fork_rng():
                torch.manual_seed(context.seed)
                statistics = collect_statistics(context, samples=wanted)
                if processes.mesh is not None:
                    # What is sharded cannot get other layers; it is gone before the model is loaded again.
                    context = replace(context, model=nn.Module())
                    context = replace(context, model=load())
                if chosen.learns:
                    enable_recomputation(context.model, checkpoint, recompute_activations)
                factorized = _factorize(context, statistics, chosen)
                ranking = chosen.score(context, factorized)
                curve = measure_curve(context, factorized, ranking.scores)
            ranked = _score_file(context, statistics, factorized, chosen, ranking, curve)
            if slim:
                ranked = ranked.without_moments()
        if processes.is_main and out is not None:
            save_scores(ranked, out, force)
            run_file(out).unlink(missing_ok=True)
            remove_leftovers(run_file(out))
            remove_leftovers(out)
        processes.wait()  # before they give up what they have kept
    return ranked


def _what_to_lower(acip: AcipConfig | None, calibration: DataConfig, precision: Precision) -> str:
    batch = calibration.batch if acip is None else acip.batch
    advice = f"Lower  --batch (now {batch})  or  --context (now {calibration.context or 'the default'})"
    if acip is not None:
        advice += ", add  --recompute-activations"
    if precision != "model":
        advice += ", or store the weights as the model does with  --precision model"
    return f"{advice}. Run states stored before are kept; --resume goes on from them where the settings allow"


def _factorize(context: RankContext, statistics: Statistics, algorithm: Algorithm) -> Factorized:
    acip = context.acip
    if acip is None:
        return factorize_model(context, statistics, algorithm.basis)
    adapter = AdapterShape(acip.adapter_rank, acip.adapter_alpha, acip.adapter_dropout, acip.adapter_scaling)
    return factorize_model(context, statistics, acip.basis, acip.mask_scale, adapter)


def _score_file(
    context: RankContext,
    statistics: Statistics,
    factorized: Factorized,
    algorithm: Algorithm,
    ranking: Ranking,
    curve: tuple[CurvePoint, ...],
) -> ScoreFile:
    checkpoint, data = context.checkpoint, context.data
    # Of one process is enough: it alone writes.
    weights = checkpoint.weights_sha256 if context.processes.is_main else None
    checkpoint.check_unchanged()
    return ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint, weights),
        task=context.task.name,
        algorithm={
            "name": algorithm.name,
            "basis": algorithm.basis,
            **asdict(context.calibration),
            **ranking.settings,  # last: ``batch`` is that of its steps
            "context": data.training.shape[1],
        },
        data=RankedOn(
            source=data.text.source,
            sha256=data.text.sha256,
            documents=data.text.documents,
            tokens=data.text.tokens,
            held_out=len(data.held_out),
            evaluation=None if data.evaluation is None else data.evaluation.source,
            evaluation_sha256=None if data.evaluation is None else data.evaluation.sha256,
        ),
        versions={
            "acip-export": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        curve=curve,
        modules={
            name: _module_scores(name, shape, statistics, factorized, ranking)
            for name, shape in checkpoint.linear_modules.items()
        },
        embedding_sensitivity=statistics.embedding_sensitivity,
        second_moments=_PackedMoments(statistics),
    )


class _PackedMoments(Mapping[str, PackedMoment]):
    """Read moments as the score file has them, one at a time."""

    def __init__(self, statistics: Statistics) -> None:
        self._places = {key: moments for moments in (statistics.inputs, statistics.gradients) for key in moments}

    def __getitem__(self, key: str) -> PackedMoment:
        return self._places[key].packed(key)

    def __contains__(self, key: object) -> bool:
        return key in self._places  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _module_scores(
    name: str, shape: tuple[int, int], statistics: Statistics, factorized: Factorized, ranking: Ranking
) -> ModuleScores:
    losses = factorized.losses[name]
    layer = factorized.layers[name] if factorized.whole else None
    b = a = None
    if layer is not None and len(layer.adapter_a):
        b, a = (pair.float().cpu().numpy() for pair in adapter_pair(layer))
    return ModuleScores(
        shape=shape,
        scores=ranking.scores[name],
        drop_loss=rounded(ranking.drop_losses[name].astype(np.float32)),
        up_sensitivity=rounded(losses.up_sensitivity.float().numpy()),
        down_sensitivity=rounded(losses.down_sensitivity.float().numpy()),
        sensitivity=factorized.sensitivity[name],
        input_moment=statistics.inputs.diagonal(statistics.input_keys[name]),
        gradient_moment=statistics.gradients.diagonal(statistics.gradient_keys[name]),
        input_key=statistics.input_keys[name],
        gradient_key=statistics.gradient_keys[name],
        adapter_a=a,
        adapter_b=b,
        adapter_scaling="constant" if layer is None else layer.adapter_scaling,
    )
