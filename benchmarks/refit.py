"""What fitting factors to their quantizer gains, step by step, in predicted loss
(acip_export/materialization/refit.py),
and what low-rank corrections of a quantized base gain (acip_export/materialization/residual.py).

    python -m benchmarks.refit --model samples/llama --scores llama.acip

Writes benchmarks/refit.json. Sums over the modules of the chosen layers; every figure is the loss of rounding over that
of the same pair rounded as the ranking has it (for corrections: over that of the base alone).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from acip_export.artifacts.scores import load_scores
from acip_export.formats.registry import export_format
from acip_export.lowrank.components import whitened_components
from acip_export.lowrank.whitening import Whitening
from acip_export.materialization import residual
from acip_export.materialization.factors import Norm, Pair
from acip_export.materialization.refit import refit
from acip_export.materialization.residual import correct
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import weight_type

# target, type of down, type of up, rank
PAIRS = (
    ("gguf", "q8_0", "q8_0", 64),
    ("gguf", "q4_0", "q4_0", 64),
    ("gguf", "q4_0", "q4_0", 96),
    ("gguf", "q3_k", "q4_0", 96),
    ("gguf", "q2_k", "q4_0", 96),
    ("onnx", "int8", "int8", 96),
    ("onnx", "int4", "int4", 64),
    ("onnx", "int4", "int4", 96),
    ("onnx", "int4-b128", "int4-b128", 96),
    ("onnx", "int2", "int2", 96),
)
# name: rounds, rotate
STEPS = {
    "as the ranking has it": (0, False),
    "rotated": (0, True),
    "one refit": (1, False),
    "rotated, one refit": (1, True),
    "three refits": (3, False),
    "rotated, two refits": (2, True),
    "rotated, three refits": (3, True),
    "rotated, four refits": (4, True),
}
CORRECTIONS = (("f16", 8), ("f16", 16), ("q8_0", 32), ("q8_0", 64))
BASES = ("q4_0", "q3_k", "q2_k", "iq2_xxs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "refit.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, scores = Checkpoint.open(args.model), load_scores(args.scores)
    pairs: dict[tuple[Any, ...], dict[str, float]] = {}
    bases: dict[str, dict[str, float]] = {}
    for name, module in scores.modules.items():
        if not any(f".{layer}." in name for layer in args.layers):
            continue
        weight = checkpoint.read(f"{name}.weight").float()
        norm = Norm.of(module, scores.second_moments, weight)
        whitenings = Whitening.of(norm.inputs), Whitening.of(norm.gradients)
        basis, inputs = whitened_components(weight, *whitenings), InputMoments(torch.from_numpy(module.input_moment))
        for case in PAIRS:
            target, down, up, rank = case
            pair = Pair(basis.up[:, :rank], basis.down[:rank])
            sums = pairs.setdefault(case, dict.fromkeys(STEPS, 0.0))
            forms = weight_type(target, up), weight_type(target, down)
            for step, (rounds, rotate) in STEPS.items():
                sums[step] += refit(pair, norm, inputs, *forms, export_format(target).round_trip, rounds, rotate).loss
        round_trip = export_format("gguf").round_trip
        for base in BASES:
            form = weight_type("gguf", base)
            found = bases.setdefault(base, {})
            alone = norm.loss(weight - round_trip(weight, base, inputs))
            found["alone"] = found.get("alone", 0.0) + alone
            for kind, rank in CORRECTIONS:
                each = weight_type("gguf", kind)
                for rounds in (1, 2, 3):
                    residual._ROUNDS = rounds
                    loss = correct(weight, norm, whitenings, inputs, form, rank, (each, each), round_trip).loss
                    key = f"rank {rank} {kind}, {rounds} rounds"
                    found[key] = found.get(key, 0.0) + loss
        print(name, flush=True)
    document = {
        "benchmark": "refit",
        "model": args.model.name,
        "layers": args.layers,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in ("torch", "xllamacpp", "numpy")},
        "pairs": [
            {
                "format": target,
                "down": down,
                "up": up,
                "rank": rank,
                "loss_as_ranked": sums["as the ranking has it"],
                "relative_loss": {s: round(v / sums["as the ranking has it"], 3) for s, v in sums.items()},
            }
            for (target, down, up, rank), sums in pairs.items()
        ],
        "corrections": {
            base: {"loss_alone": found["alone"]}
            | {key: round(value / found["alone"], 3) for key, value in found.items() if key != "alone"}
            for base, found in bases.items()
        },
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
