"""Score files that know second moments of inputs, made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
from acip_export.lowrank.moments import PackedMoment, pack_moment
from tests.support import make_scores


def scores_with_moments(model: Path, file: Path) -> ScoreFile:
    """Made-up scores with second moments of inputs; layers that read the same share one."""
    plain = make_scores(model)
    moments: dict[str, PackedMoment] = {}
    modules = {}
    for number, (name, module) in enumerate(plain.modules.items()):
        key = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        if key not in moments:
            generator = torch.Generator().manual_seed(number)
            columns = module.shape[1]
            samples = torch.randn(600, columns, generator=generator, dtype=torch.float64)
            samples += torch.randn(600, 4, generator=generator, dtype=torch.float64) @ (
                3 * torch.randn(4, columns, generator=generator, dtype=torch.float64)
            )
            second = samples.T @ samples / 600
            moments[key] = pack_moment(second)
            diagonals = second.diagonal().float().numpy()
        modules[name] = replace(module, input_key=key, input_moment=diagonals)
    moments["model.embed_tokens.weight"] = moments["model.layers.0.self_attn.q_proj"]
    save_scores(replace(plain, modules=modules, second_moments=moments), file)
    return load_scores(file)
