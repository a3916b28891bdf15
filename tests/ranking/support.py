"""Small models whose predictions are sharp enough to be hurt, and text for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import DataConfig
from acip_export.ranking.context import RankContext
from acip_export.ranking.data import read_data
from acip_export.ranking.load import load_model
from acip_export.ranking.losses import next_token_loss
from tests.support import CORPUS, make_model

CALIBRATION = DataConfig(context=32, statistics_tokens=4096, curve_tokens=1024, batch=8)


def sharp_model(directory: Path, **overrides: Any) -> Path:
    """A random model with weights large enough that its output distribution is far from uniform."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 64, **overrides}
    make_model(directory, **settings)
    file = directory / "model.safetensors"
    tensors = {
        n: t * (12 if t.ndim == 2 and "layers" in n else 4 if t.ndim == 2 else 1) for n, t in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    return directory


def calibration_text(file: Path, repeats: int = 60) -> Path:
    """Text whose pieces repeat, but not in step with the windows."""
    lines = "".join(CORPUS).splitlines(keepends=True)
    order = torch.randint(len(lines), (repeats * len(lines),), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("".join(lines[i] for i in order), encoding="utf-8")
    return file


def context_of(
    model: Path, text: Path, windows: int | None = None, calibration: DataConfig = CALIBRATION
) -> RankContext:
    """The model on the CPU with the text that it is ranked on; statistics from the first ``windows`` of it."""
    checkpoint = Checkpoint.open(model)
    data = read_data(checkpoint, text, calibration)
    data = replace(data, statistics=data.statistics[:windows])
    return RankContext(checkpoint, load_model(checkpoint, torch.device("cpu")), data, calibration)


@torch.no_grad()
def held_out_divergence(model: nn.Module, dense: nn.Module, windows: Tensor) -> float:
    """Measure the mean KL divergence from the dense model, nats per token."""
    ours, theirs = (each(input_ids=windows).logits.double().log_softmax(-1) for each in (model, dense))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Measure the mean negative log-likelihood, nats per token."""
    losses = [next_token_loss(model, part).item() * len(part) for part in windows.split(batch)]
    return sum(losses) / len(windows)
