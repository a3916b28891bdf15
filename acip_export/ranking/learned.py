"""Carry a learned ranking from the factorized model to its scores, storing its state on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch

from acip_export.errors import RankingError
from acip_export.io.interruptions import noted_interruptions
from acip_export.ranking.acip_run import AcipRun, advance
from acip_export.ranking.algorithm import Ranking
from acip_export.ranking.config import AcipConfig
from acip_export.ranking.context import RankContext
from acip_export.ranking.factorized_model import Factorized
from acip_export.ranking.mask_gradients import component_fisher
from acip_export.ranking.run_state import RunStates


def learn(context: RankContext, factorized: Factorized) -> Ranking:
    """Run :class:`AcipRun` to the end, from the run state that the context resumes, if it does.

    Raises:
        RankingError: the run diverged, or there is no state of it to resume.
    """
    config = context.acip
    assert config is not None  # every algorithm that learns is given hyper-parameters
    drop_losses = _predicted(context, factorized, config)
    run = AcipRun(context, factorized.layers, drop_losses, config)
    if context.run_states is None:
        for _ in advance(run, context.data.training.shape[1], context.progress):
            pass
    else:
        _store_on_the_way(run, context, context.run_states)
    settings = {**asdict(config), "mask_steps": run.mask_steps, "tune_steps": run.tune_steps}
    return Ranking(run.scores(), drop_losses, settings)


def _predicted(
    context: RankContext, factorized: Factorized, config: AcipConfig
) -> Mapping[str, npt.NDArray[np.float64]]:
    if config.predictor == "fisher":
        return component_fisher(context, factorized)
    return factorized.drop_losses


def _store_on_the_way(run: AcipRun, context: RankContext, states: RunStates) -> None:
    """Go to the end, and store the run now and then, when it is interrupted, and at its end, for what follows it."""
    identity = _identity(context, next(iter(run.layers.values())).up.dtype)
    if states.resume:
        states.load(run, identity)
    kept, saved = states.resume, True
    states.begin()
    # A step that is cut in two cannot be stored.
    with noted_interruptions() as run.interrupted:
        try:
            for _ in advance(run, context.data.training.shape[1], context.progress):
                stop = run.should_stop()
                saved = run.processes.as_main(states.due()) or stop
                if saved:
                    states.save(run, identity)
                    kept = True
                if stop:
                    raise KeyboardInterrupt
            if not saved:
                states.save(run, identity)
            if run.should_stop():
                raise KeyboardInterrupt
        except RankingError as error:
            where = f"\nThe last good state is in {states.file}" if kept else ""
            raise RankingError(f"{error}{where}") from error


def _identity(context: RankContext, dtype: torch.dtype) -> str:
    """Return a digest of everything that a run's outcome follows from."""
    assert context.acip is not None
    parts = [
        context.checkpoint.fingerprint,
        context.data.text.sha256,
        asdict(context.acip),
        asdict(context.calibration),
        str(dtype),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
