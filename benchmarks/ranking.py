"""Quality of every ranking at every size: perplexity on text that no ranking has seen, the same bytes for all.

    python -m benchmarks.ranking                         what is missing in benchmarks/ranking.json, then the table
    python -m benchmarks.ranking --only kfac acip --seeds 0 1 --again
    python -m benchmarks.ranking --model samples/qwen3   another model's entries
    python -m benchmarks.ranking --table                 the table alone

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import AcipConfig, DataConfig, automatic_config, rank_model
from acip_export.ranking.load import linear_weights

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
        "acip, adapters at a constant scale": replace(automatic, adapter_scaling="constant"),
        "acip, no adapters": replace(automatic, adapter_rank=0),
        "acip, weaker penalty": replace(automatic, penalty=automatic.penalty / 5),
    }


def linear_share(checkpoint: Checkpoint) -> float:
    """Of the model's parameters, those of the linear layers; rank alone reaches no byte ratio below one minus it."""
    return linear_weights(checkpoint) / sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def linear_ratios(checkpoint: Checkpoint, byte_ratios: Sequence[float] = RATIOS) -> tuple[float, ...]:
    """Of the linear layers' parameters, for the byte ratios of the whole model that they alone can reach."""
    share = linear_share(checkpoint)
    return tuple(1 - (1 - ratio) / share for ratio in byte_ratios if 1 - ratio < share)


def quality(scores: ScoreFile) -> dict[str, list[float | None]]:
    """By size: perplexities, or of an encoder the distances and how well similarities are kept."""
    adapted = [point.loss_with_adapters for point in scores.curve]

    def rounded(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else round(value, 5) for value in values]

    if scores.task != "causal":
        return {
            "distance": rounded(point.loss for point in scores.curve),
            "distance_with_adapters": rounded(adapted),
            "spearman": rounded(point.spearman for point in scores.curve),
            "similarity_error": rounded(point.similarity_error for point in scores.curve),
        }
    return {
        "perplexity": [round(math.exp(point.loss), 3) for point in scores.curve],
        "perplexity_with_adapters": [None if loss is None else round(math.exp(loss), 3) for loss in adapted],
        "divergence": rounded(point.divergence for point in scores.curve),
        "divergence_with_adapters": rounded(point.divergence_with_adapters for point in scores.curve),
    }


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
    return {
        "settings": dict(scores.algorithm),
        "versions": dict(scores.versions),
        "seconds": round(time.perf_counter() - started, 1),
        **quality(scores),
    }


def exported(result: Mapping[str, Any], figure: str) -> list[float]:
    """A figure by size, with adapters where they lower the loss."""
    with_adapters = result.get(f"{figure}_with_adapters", [None] * len(result[figure]))
    pairs = zip(result[figure], with_adapters, strict=True)
    return [min(value for value in pair if value is not None) for pair in pairs]


def table(results: Mapping[str, Any], byte_ratios: Sequence[float], figure: str = "perplexity", digits: int = 2) -> str:
    """Markdown: by entry the mean over seeds of what is exported, and half the spread if there are several."""
    by_name: dict[str, list[list[float]]] = {}
    for key, result in results.items():
        by_name.setdefault(key.rpartition(", seed ")[0], []).append(exported(result, figure))
    lines = [
        "| ranking | " + " | ".join(f"{ratio:g}" for ratio in byte_ratios) + " |",
        "| --- |" + " ---: |" * len(byte_ratios),
    ]
    for name, runs in by_name.items():
        cells = []
        for values in zip(*runs, strict=True):
            half = (max(values) - min(values)) / 2
            spread = f" ± {half:.{digits}f}" if round(half, digits) else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def adapter_table(results: Mapping[str, Any]) -> str:
    """Markdown: the default near full size, without adapters and with them."""
    lines = ["| byte ratio | without adapters | with | exported |", "| --- | ---: | ---: | ---: |"]
    result = results.get("acip, seed 0")
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
    document: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    models = document["models"]
    document = {
        "benchmark": "ranking",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "models": models,
    }
    sizes = {"evaluation_tokens": args.tokens, "byte_ratios": list(RATIOS)}
    before = models.get(args.model.name, {})
    comparable = all(before.get(key) == value for key, value in sizes.items())
    results = before["results"] if comparable else {}
    models[args.model.name] = {**sizes, "results": results}
    for name in [] if args.table else args.only or entries:
        for seed in sorted({*args.seeds, *([0, 1] if name == "acip" else [])}):
            key = f"{name}, seed {seed}"
            if key in results and not args.again:
                continue
            results[key] = result = measure(args, name, entries[name], seed)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(key, result["seconds"], result["perplexity"], result["perplexity_with_adapters"], flush=True)
    print(table(results, RATIOS))
    print()
    print(adapter_table(results))


if __name__ == "__main__":
    main()
