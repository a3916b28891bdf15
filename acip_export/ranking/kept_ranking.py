"""Keep what is done of a ranking beside its score file, for the same command to go on with."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from acip_export.io.kept_work import Work, work_beside
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking.config import Basis, DataConfig
from acip_export.ranking.data import CalibrationData
from acip_export.ranking.processes import Processes
from acip_export.version import __version__


def ranking_work(
    out: Path | None, processes: Processes, origin: str, settings: str = ""
) -> AbstractContextManager[Work]:
    """Return the work of a ranking; it is kept where a score file is written, by every process for itself."""
    return nullcontext(Work()) if out is None else work_beside(out.absolute(), origin, settings, processes)


def origin_of(
    checkpoint: Checkpoint,
    model: nn.Module,
    text: CalibrationData | None,
    calibration: DataConfig,
    basis: Basis,
    samples: bool,
    processes: Processes,
    precision: str,
) -> str:
    """Return a digest of everything that statistics and factors follow from.

    Args:
        text: ``None``: what the model samples, which follows from the rest. samples: whether statistics keep any.
    """
    weight = model.get_parameter(f"{next(iter(checkpoint.linear_modules))}.weight")
    parts = [
        __version__,
        torch.__version__,
        checkpoint.fingerprint,
        # The fingerprint takes a sample of each tensor.
        {shard: str(stamp) for shard, stamp in checkpoint.stamps.items()},
        "self" if text is None else _digest(text),
        asdict(calibration),
        basis,
        samples,
        processes.device.type,
        processes.mesh is not None,  # sharded models take other batches
        precision,
        str(weight.dtype),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(text: CalibrationData) -> str:
    digest = hashlib.sha256(text.text.sha256.encode())
    for windows in (text.training, text.statistics):
        digest.update(str(tuple(windows.shape)).encode())
        digest.update(windows.contiguous().numpy().data)
    return digest.hexdigest()
