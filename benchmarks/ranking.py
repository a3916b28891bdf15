"""Quality of every ranking at every size: perplexity on text that no ranking has seen, same parameters for all.

    python benchmarks/ranking.py --model samples/llama --data samples/text/calibration.txt \\
        --evaluation samples/text/evaluation.txt --only kfac acip

Writes benchmarks/ranking.json: machine, versions, and for every entry its settings, perplexities and seconds. Entries
that are not run again stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from acip_export.checkpoint import Checkpoint
from acip_export.rank import AcipConfig, DataConfig, automatic_config, rank_model

TRAINING_FREE = ("magnitude", "energy", "kfac", "fisher")


def variants(automatic: AcipConfig) -> dict[str, AcipConfig]:
    """The default, and one change at a time."""
    return {
        "acip": automatic,
        "acip, plain SVD basis": replace(automatic, basis="svd"),
        "acip, cross-entropy": replace(automatic, objective="ce"),
        "acip, masks start at one": replace(automatic, start="ones"),
        "acip, ties by index": replace(automatic, start="ones", tie_break="index"),
        "acip, weaker penalty": replace(automatic, penalty=0.02),
        "acip, post-tuned at the stop ratio": replace(automatic, post_tune_sizes="stop"),
    }


def measure(args: argparse.Namespace, name: str, config: AcipConfig | None, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    scores = rank_model(
        args.model,
        args.data,
        algorithm="acip" if config else name,
        acip=config,
        calibration=DataConfig(seed=seed, curve_tokens=args.tokens),
        evaluation=args.evaluation,
    )
    return {
        "settings": dict(scores.algorithm),
        "seconds": round(time.perf_counter() - started, 1),
        "perplexity": {f"{point.ratio:g}": round(math.exp(point.loss), 3) for point in scores.curve},
        "perplexity_with_adapters": {
            f"{point.ratio:g}": round(math.exp(point.loss_with_adapters), 3)
            for point in scores.curve
            if point.loss_with_adapters is not None
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8_192, help="of the evaluation text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="names of entries; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "ranking.json")
    args = parser.parse_args()
    entries: dict[str, AcipConfig | None] = dict.fromkeys(TRAINING_FREE)
    entries |= variants(automatic_config(Checkpoint.open(args.model)))
    unknown = set(args.only or []) - set(entries)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; choose from {sorted(entries)}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    document: dict[str, Any] = {
        "model": args.model.name,
        "evaluation_tokens": args.tokens,
        "machine": machine,
        "versions": versions,
        "results": json.loads(args.out.read_text())["results"] if args.out.exists() else {},
    }
    for name in args.only or entries:
        for seed in args.seeds:
            key = f"{name}, seed {seed}"
            document["results"][key] = result = measure(args, name, entries[name], seed)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(key, json.dumps({k: v for k, v in result.items() if k != "settings"}), flush=True)


if __name__ == "__main__":
    main()
