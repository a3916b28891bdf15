"""Quality of every ranking at every size: perplexity on text that no ranking has seen, the same bytes for all.

    python benchmarks/ranking.py                         what is missing in benchmarks/ranking.json, then the table
    python benchmarks/ranking.py --only kfac acip --seeds 0 1 --again
    python benchmarks/ranking.py --table                 the table alone

A size is a share of the bytes of the whole model in its stored dtype, embeddings included; only linear layers shrink,
factor pairs in the same dtype, so a byte ratio b of a model whose linear layers hold the share s of its bytes is the
ratio 1 - (1 - b) / s of the linear layers. Adapters are folded into pairs of the same rank and cost no bytes; where
they make a size worse, it is exported without them, and the table shows what is exported.

Entries are kept one by one, with their settings, versions and seconds: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from acip_export.checkpoint import Checkpoint
from acip_export.rank import AcipConfig, DataConfig, automatic_config, rank_model
from acip_export.rank.model import linear_weights

ROOT = Path(__file__).resolve().parent.parent
TRAINING_FREE = ("magnitude", "energy", "first-order", "kfac", "fisher")
RATIOS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def variants(automatic: AcipConfig) -> dict[str, AcipConfig]:
    """The default, and one change at a time."""
    ones = replace(automatic, start="ones")
    return {
        "acip": automatic,
        "acip, plain SVD basis": replace(automatic, basis="svd"),
        "acip, cross-entropy": replace(automatic, objective="ce"),
        "acip, masks start at one": ones,
        "acip, masks start at one, ties by index": replace(ones, tie_break="index"),
        "acip, cross-entropy, masks start at one": replace(ones, objective="ce"),
        "acip, cross-entropy, masks start at one, ties by index": replace(ones, objective="ce", tie_break="index"),
        "acip, post-tuned at the stop ratio": replace(automatic, post_tune_sizes="stop"),
        "acip, no adapters": replace(automatic, adapter_rank=0),
        "acip, weaker penalty": replace(automatic, penalty=automatic.penalty / 5),
    }


def linear_ratios(checkpoint: Checkpoint) -> tuple[float, ...]:
    """Of the linear layers' parameters, for the byte ratios of the whole model."""
    share = linear_weights(checkpoint) / sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return tuple(1 - (1 - ratio) / share for ratio in RATIOS)


def measure(args: argparse.Namespace, name: str, config: AcipConfig | None, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    ratios = linear_ratios(Checkpoint.open(args.model))
    scores = rank_model(
        args.model,
        args.data,
        algorithm="acip" if config else name,
        acip=config,
        calibration=DataConfig(seed=seed, curve_tokens=args.tokens, curve_ratios=ratios),
        evaluation=args.evaluation,
        cache=args.cache,
    )
    adapted = [point.loss_with_adapters for point in scores.curve]
    return {
        "settings": dict(scores.algorithm),
        "versions": dict(scores.versions),
        "seconds": round(time.perf_counter() - started, 1),
        "perplexity": [round(math.exp(point.loss), 3) for point in scores.curve],
        "perplexity_with_adapters": [None if loss is None else round(math.exp(loss), 3) for loss in adapted],
    }


def table(document: dict[str, Any]) -> str:
    """Markdown: by entry the mean over seeds of what is exported, and the spread (largest less smallest) if several."""
    by_name: dict[str, list[list[float]]] = {}
    for key, result in document["results"].items():
        pairs = zip(result["perplexity"], result["perplexity_with_adapters"], strict=True)
        best = [min(value for value in pair if value is not None) for pair in pairs]
        by_name.setdefault(key.rpartition(", seed ")[0], []).append(best)
    lines = [
        "| ranking | " + " | ".join(f"{ratio:g}" for ratio in document["byte_ratios"]) + " |",
        "| --- |" + " ---: |" * len(document["byte_ratios"]),
    ]
    for name, runs in by_name.items():
        cells = []
        for values in zip(*runs, strict=True):
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def adapter_table(document: dict[str, Any]) -> str:
    """Markdown: the default near full size, without adapters and with them."""
    lines = ["| byte ratio | without adapters | with | exported |", "| --- | ---: | ---: | ---: |"]
    result = document["results"].get("acip, seed 0")
    if result is not None:
        for ratio, off, on in zip(RATIOS, result["perplexity"], result["perplexity_with_adapters"], strict=True):
            lines.append(f"| {ratio:g} | {off:.2f} | {on:.2f} | {min(off, on):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "llama")
    parser.add_argument("--data", type=Path, default=ROOT / "samples" / "text" / "calibration.txt")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "samples" / "text" / "evaluation.txt")
    parser.add_argument("--tokens", type=int, default=8_192, help="of the evaluation text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="acip itself is always run with 0 and 1")
    parser.add_argument("--only", nargs="*", help="names of entries; default: all")
    parser.add_argument("--again", action="store_true", help="also entries that are there")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--cache", type=Path, help="directory that keeps the SVDs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "ranking.json")
    args = parser.parse_args()
    entries: dict[str, AcipConfig | None] = dict.fromkeys(TRAINING_FREE)
    entries |= variants(automatic_config(Checkpoint.open(args.model)))
    unknown = set(args.only or []) - set(entries)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; choose from {sorted(entries)}")
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    document: dict[str, Any] = {
        "benchmark": "ranking",
        "model": args.model.name,
        "evaluation_tokens": args.tokens,
        "byte_ratios": list(RATIOS),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "results": before["results"] if before.get("byte_ratios") == list(RATIOS) else {},
    }
    for name in [] if args.table else args.only or entries:
        for seed in sorted({*args.seeds, *([0, 1] if name == "acip" else [])}):
            key = f"{name}, seed {seed}"
            if key in document["results"] and not args.again:
                continue
            document["results"][key] = result = measure(args, name, entries[name], seed)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(key, result["seconds"], result["perplexity"], result["perplexity_with_adapters"], flush=True)
    print(table(document))
    print()
    print(adapter_table(document))


if __name__ == "__main__":
    main()
