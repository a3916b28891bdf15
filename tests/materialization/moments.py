"""Score files that know second moments of inputs, and of output gradients, made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
from acip_export.lowrank.moments import PackedMoment, pack_gradients, pack_moment
from acip_export.model.checkpoint import Checkpoint
from tests.support import make_scores


def correlated(columns: int, seed: int) -> torch.Tensor:
    """Return the second moment of 600 vectors that four directions go through."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(600, columns, generator=generator, dtype=torch.float64)
    samples += torch.randn(600, 4, generator=generator, dtype=torch.float64) @ (
        3 * torch.randn(4, columns, generator=generator, dtype=torch.float64)
    )
    return samples.T @ samples / 600


def scores_with_moments(model: Path, file: Path, gradients: bool = False) -> ScoreFile:
    """Made-up scores with second moments of inputs; layers that read the same share one.

    Args:
        gradients: also of output gradients.
    """
    plain = make_scores(model)
    moments: dict[str, PackedMoment] = {}
    modules = {}
    for number, (name, module) in enumerate(plain.modules.items()):
        key = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        if key not in moments:
            second = correlated(module.shape[1], number)
            moments[key] = pack_moment(second)
            diagonals = second.diagonal().float().numpy()
        modules[name] = replace(module, input_key=key, input_moment=diagonals)
        if gradients:
            second, own = correlated(module.shape[0], 1000 + number), f"{name}.gradient"
            moments[own] = pack_gradients(second, Checkpoint.open(model).read(f"{name}.weight"))
            diagonal = second.diagonal().float().numpy()
            modules[name] = replace(modules[name], gradient_key=own, gradient_moment=diagonal)
    moments["model.embed_tokens.weight"] = moments["model.layers.0.self_attn.q_proj"]
    save_scores(replace(plain, modules=modules, second_moments=moments), file)
    return load_scores(file)
