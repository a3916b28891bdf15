"""How well the predicted loss predicts: plans of many sizes, types, layouts and formats, each measured.

    python -m benchmarks.predict --model samples/llama --scores llama.acip --text samples/text/evaluation.txt

Every plan is materialized, and the loss of its bundle, rounded as the export has it, is measured on text that neither
ranking nor planning saw. (The runtimes give the same perplexity as the rounded bundle to four digits: ``make demo``.)
Nothing is fitted to these figures. Writes benchmarks/predict.json and docs/images/predict.svg; measured plans stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acip_export.api import evaluation_text, materialize_bundle, plan_export
from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.scores import load_scores
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.embedding_similarity import spearman
from acip_export.model.torch_model import load_causal_lm
from acip_export.planning import PlanRequest

HERE = Path(__file__).resolve().parent
CONTEXT = 256
# Shares of the float16 size of the file, and what the plan may choose from. Near-lossless plans differ by less than the
# measurement's own error, so that most are below: the spread is from 60 % down to the smallest feasible.
PLANS: tuple[tuple[str, str, tuple[str, ...], tuple[float, ...]], ...] = (
    ("gguf", "stock", (), (0.55, 0.42, 0.34, 0.3, 0.26, 0.23, 0.2)),
    ("gguf", "stock", ("q4_0",), (0.3,)),
    ("gguf", "stock", ("q3_k",), (0.3,)),
    ("gguf", "stock", ("q2_k",), (0.3,)),
    ("gguf", "stock", ("iq3_xxs", "q4_k"), (0.25,)),
    ("gguf", "lora", ("q8_0",), (0.5, 0.42, 0.36, 0.3)),
    ("gguf", "lora", ("q8_0", "q4_0"), (0.34, 0.28, 0.24)),
    ("gguf", "lora", ("f16", "q8_0", "q3_k", "q2_k"), (0.34, 0.28, 0.24)),
    ("gguf", "lora", ("q4_0", "q2_k"), (0.22,)),
    ("onnx", "factored", (), (0.6, 0.45, 0.38, 0.32, 0.27, 0.23)),
    ("onnx", "factored", ("int8",), (0.5, 0.42, 0.36)),
    ("onnx", "factored", ("f32",), (1.3, 1.0)),
    ("onnx", "factored", ("int4",), (0.32, 0.27)),
    ("onnx", "factored", ("int2", "int4"), (0.3, 0.22)),
)


@torch.no_grad()
def losses(model: torch.nn.Module, windows: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean next-token loss of every window."""
    found = []
    for part in windows.split(16):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        found.append(each.mean(1).double().numpy())
    return np.concatenate(found)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman correlation of predicted and measured loss, and mean error of log-perplexity; all and lower half."""
    ordered = sorted(results, key=lambda r: r["measured_loss"])
    halves = {
        "all": ordered,
        "high quality half": ordered[: len(ordered) // 2],
        "low quality half": ordered[len(ordered) // 2 :],
    }
    found: dict[str, Any] = {}
    for name, part in halves.items():
        predicted = np.array([r["predicted_loss"] for r in part])
        measured = np.array([r["measured_loss"] for r in part])
        found[name] = {
            "plans": len(part),
            "spearman": round(spearman(predicted, measured), 4),
            "mean_error_of_log_perplexity": round(float(np.abs(predicted - measured).mean()), 4),
            "mean_measured": round(float(measured.mean()), 4),
            "bias": round(float((predicted - measured).mean()), 4),
        }
    return found


def draw(document: dict[str, Any], file: Path) -> None:
    """Predicted against measured loss, both logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "acip"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 5))
    groups: dict[str, list[dict[str, Any]]] = {}
    for model, entry in document["models"].items():
        for r in entry["results"]:
            groups.setdefault(f"{model}: {r['format']}, {r['layout']}", []).append(r)
    for marker, (name, rows) in zip("os^Dv<>pP*X" * 3, sorted(groups.items()), strict=False):
        axes.errorbar(
            [max(r["predicted_loss"], 1e-4) for r in rows],
            [max(r["measured_loss"], 1e-4) for r in rows],
            yerr=[r["standard_error"] for r in rows],
            fmt=marker,
            markersize=5,
            linewidth=0.8,
            alpha=0.8,
            label=name,
        )
    line = [3e-4, 3.0]
    axes.plot(line, line, color="gray", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="predicted loss (nats per token above dense)", ylabel="measured loss")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--again", action="store_true", help="measure all plans again")
    parser.add_argument("--out", type=Path, default=HERE / "predict.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, scores = Checkpoint.open(args.model), load_scores(args.scores)
    windows = torch.from_numpy(evaluation_text(checkpoint.path, args.text, CONTEXT, args.tokens).windows)
    dense = losses(load_causal_lm(checkpoint, torch.float32), windows)
    document: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    document["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
    document["versions"] = {name: version(name) for name in ("torch", "transformers", "xllamacpp", "numpy")}
    entry = document["models"].setdefault(args.model.name, {"results": []})
    entry["algorithm"], entry["tokens"] = scores.algorithm["name"], int(windows.numel())
    entry["dense_perplexity"] = math.exp(float(dense.mean()))
    before = (
        {} if args.again else {(r["format"], r["layout"], tuple(r["types"]), r["share"]): r for r in entry["results"]}
    )
    entry["results"] = []
    for fmt, layout, types, shares in PLANS:
        for share in shares:
            budget = int(share * sum(math.prod(t.shape) * 2 for t in checkpoint.tensors.values()))
            request = PlanRequest(fmt, budget, "file", layout=layout, types=types, context=CONTEXT)
            plan = plan_export(checkpoint, scores, request)
            tensors = plan.to_json()["tensors"]
            known = before.get((fmt, layout, types, share))
            result = {
                "format": fmt,
                "layout": layout,
                "types": list(types),
                "share": share,
                "bytes": plan.planned_bytes,
                "low_rank": sum(t.representation in ("lora", "factored") for t in plan.tensors),
                "corrected": sum(t.representation == "residual" for t in plan.tensors),
                "predicted_loss": plan.predicted_loss,
                "adapters": plan.adapters,
            }
            same = (
                known is not None
                and known["bytes"] == plan.planned_bytes
                and (known["digest"], known["adapters"]) == (_digest(tensors), plan.adapters)
            )
            if same and known is not None:
                measured, error = known["measured_loss"], known["standard_error"]
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    bundle = materialize_bundle(checkpoint, scores, plan, Path(scratch) / "bundle")
                    difference = losses(load_bundle(bundle, export_format(fmt).round_trip), windows) - dense
                measured = float(difference.mean())
                error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
            entry["results"].append(
                result | {"measured_loss": measured, "standard_error": error, "digest": _digest(tensors)}
            )
            print(
                f"{fmt} {layout} {','.join(types) or 'default'} {share}: low rank {result['low_rank']}, "
                f"corrected {result['corrected']}, predicted {plan.predicted_loss:.4f}, "
                f"measured {measured:.4f} +- {error:.4f}",
                flush=True,
            )
    entry["summary"] = summary(entry["results"])
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, HERE.parent / "docs" / "images" / "predict.svg")
    print(json.dumps(entry["summary"], indent=1))


def _digest(tensors: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
