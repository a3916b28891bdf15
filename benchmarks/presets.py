"""Our plans against presets and against ranks at one type: perplexity in the runtime at equal file sizes.

    python -m benchmarks.presets [--quick] [--model samples/llama samples/qwen3] [--only gguf]

For every model and format, series of exports, measured in llama.cpp or onnxruntime on text that neither training
nor ranking saw:

- plans at every budget of a sweep from 15 % to 100 % of the bf16 bytes, and at the bytes of every preset; for GGUF
  twice, for stock llama.cpp and for the one with our extension, where plans may choose factor pairs;
- presets: everything dense in one type, by our own writer (with importance, as llama.cpp's tools do with an imatrix);
- ACIP ranks at one fixed type: what ranking alone gives.

Budgets are files, since presets know of nothing else. Results are written after every export and kept: a run that was
interrupted goes on, and one with more tokens measures again. Then benchmarks/presets.json says at which budgets a
preset of at most our bytes was better, and docs/images/presets.svg shows all curves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np

import acip_export
from acip_export.api import evaluation_text, export_model, planning_problem
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, DoesNotFit, PlanRequest, Problem, Question, preset, resolve
from acip_export.verification.metrics import log_softmax

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".bench"
TEXTS = ROOT / "samples" / "text"
CONTEXT = 256
SHARES = (0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)
QUICK_SHARES = (0.15, 0.25, 0.4, 1.0)
SESSIONS = {
    "gguf": ("converters.gguf.runtimes.llama_cpp", "LlamaCppSession"),
    "onnx": ("converters.onnx.runtimes.onnxruntime", "OnnxRuntimeSession"),
}
EXTENDED = "plan for extended llama.cpp"
# format -> layouts of our plans by series, presets, and the layout and type of ACIP ranks alone.
CASES: dict[str, dict[str, Any]] = {
    "gguf": {
        "plans": {"plan": "stock", EXTENDED: "factored"},
        "presets": (
            "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs",
            "iq2_xxs",
        ),
        "quick": ("q8_0", "q4_k", "q3_k", "iq3_xxs", "q2_k", "iq2_xxs"),
        "ranks": ("lora", "q8_0"),
    },
    "onnx": {
        "plans": {"plan": "factored"},
        "presets": ("int8", "int8-b128", "int4", "int4-b64", "int4-b128"),
        "quick": ("int8", "int4", "int4-b128"),
        "ranks": ("factored", "int8"),
    },
}  # fmt: skip


def ranked(checkpoint: Checkpoint, given: Path | None) -> ScoreFile:
    """The score file given, or one made by the default algorithm and kept."""
    file = given or WORK / f"{checkpoint.name}.acip"
    if not file.is_file():
        print(f"ranking {checkpoint.name}", flush=True)
        WORK.mkdir(exist_ok=True)
        acip_export.rank(checkpoint, TEXTS / "calibration.txt", out=file)
    return load_scores(file)


def series(
    checkpoint: Checkpoint, scores: ScoreFile, fmt: str, shares: tuple[float, ...], presets: tuple[str, ...]
) -> Iterator[tuple[str, str, Plan]]:
    """Every plan to be measured: its series, its label, itself."""
    case = CASES[fmt]
    everything = resolve(PlanRequest(fmt, layout=case["plans"]["plan"], types=presets, context=CONTEXT), checkpoint)
    one_type = planning_problem(checkpoint, scores, everything)
    budgets = {f"{share:.1%} of bf16": round(share * checkpoint.weight_bytes) for share in shares}
    for type_ in one_type.space.types:
        plan = preset(one_type, type_).largest("file", everything.rule.at_every_budget(CONTEXT))
        budgets[f"bytes of {type_.name}"] = plan.planned_bytes
        yield "preset", type_.name, plan
    for name, layout in case["plans"].items():
        question = resolve(PlanRequest(fmt, layout=layout, context=CONTEXT), checkpoint)
        yield from at_budgets(name, planning_problem(checkpoint, scores, question), question, budgets)
    layout, kind = case["ranks"]
    ranks = resolve(PlanRequest(fmt, layout=layout, types=(kind,), context=CONTEXT), checkpoint)
    yield from at_budgets(f"ranks at {kind}", planning_problem(checkpoint, scores, ranks), ranks, budgets)


def at_budgets(
    name: str, problem: Problem, question: Question, budgets: dict[str, int]
) -> Iterator[tuple[str, str, Plan]]:
    for label, nbytes in budgets.items():
        try:
            yield name, label, problem.plan(Budget(nbytes, "file"), question.rule.at_every_budget(CONTEXT))
        except DoesNotFit:
            continue  # below this series' smallest size: it has no point there


def measure(checkpoint: Checkpoint, scores: ScoreFile, plan: Plan, windows: Any) -> list[float]:
    """Mean loss of each window, in the runtime."""
    module, name = SESSIONS[plan.format]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "export"
        export_model(checkpoint, scores, plan, out, verify=False)
        with getattr(import_module(module), name)(out, plan.serving) as session:
            return [
                round(float(-log_softmax(logits[:-1])[np.arange(len(window) - 1), window[1:]].mean()), 6)
                for logits, window in zip(session.logits(windows), windows, strict=True)
            ]


def identity(plan: Plan, scores: ScoreFile, tokens: int) -> str:
    """Of what is measured: the same decisions need no second export."""
    parts = [plan.format, plan.layout, plan.adapters, scores.sha256, tokens, [repr(t) for t in plan.tensors]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def comparison(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Where another series with at most our bytes was better.

    A loss within two standard errors of the difference (paired by window) is counted, and marked.
    """
    ours = [point for point in points if point["series"] == "plan"]
    lost: dict[tuple[str, str], dict[str, Any]] = {}  # by what was exported: several budgets may have one plan
    pairs: set[tuple[str, str]] = set()
    for other in (point for point in points if not point["series"].startswith("plan")):
        fair = [point for point in ours if point["bytes"] >= other["bytes"]]
        if not fair:
            continue
        mine = min(fair, key=lambda point: point["bytes"])
        pair = mine["identity"], other["identity"]
        pairs.add(pair)
        gap = np.array(mine["losses"]) - np.array(other["losses"])
        if gap.mean() > 0 and pair not in lost:
            error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
            lost[pair] = {
                "to": f"{other['series']} {other['label']}",
                "bytes": [mine["bytes"], other["bytes"]],
                "perplexity": [mine["perplexity"], other["perplexity"]],
                "nats": round(float(gap.mean()), 5),
                "standard_error": round(error, 5),
                "within_noise": bool(gap.mean() <= 2 * error),
            }
    return {"compared": len(pairs), "lost": list(lost.values())}


def plot(document: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted({(point["model"], point["format"]) for point in document["points"]}, key=lambda g: (g[1], g[0]))
    models = sorted({model for model, _ in groups})
    formats = sorted({fmt for _, fmt in groups})
    figure, axes = plt.subplots(
        len(models), len(formats), figsize=(5.2 * len(formats), 3.6 * len(models)), squeeze=False, layout="constrained"
    )
    mpl.rcParams["svg.hashsalt"] = "presets"  # equal data, equal file
    for model, fmt in groups:
        axis = axes[models.index(model)][formats.index(fmt)]
        points = [p for p in document["points"] if (p["model"], p["format"]) == (model, fmt)]
        ranks = next(p["series"] for p in points if p["series"].startswith("ranks"))
        for name, style in (
            ("plan", {"color": "#0b6e4f", "marker": "o", "markersize": 3.5, "linewidth": 1.8, "zorder": 3}),
            (EXTENDED, {"color": "#1d70b8", "marker": "^", "markersize": 3, "linewidth": 1.2, "zorder": 2}),
            ("preset", {"color": "#c1121f", "marker": "s", "markersize": 4.5, "linestyle": "none", "zorder": 4}),
            (ranks, {"color": "#6c757d", "marker": ".", "linewidth": 1.2, "linestyle": "--", "zorder": 2}),
        ):
            line = sorted({(p["bytes"] / 1e6, p["perplexity"]) for p in points if p["series"] == name})
            if not line:
                continue
            label = {
                "plan": "acip-export",
                EXTENDED: "acip-export, llama.cpp with factor pairs",
                "preset": "one type for everything",
            }.get(name, f"ACIP {name}")
            axis.plot([x for x, _ in line], [y for _, y in line], label=label, **style)
        presets = sorted({(p["bytes"], p["perplexity"], p["label"]) for p in points if p["series"] == "preset"})
        low = min(p["perplexity"] for p in points)
        for place, (size, perplexity, label) in enumerate(presets):
            # Neighbours' labels at different heights, so that they can be told apart.
            axis.annotate(label, (size / 1e6, perplexity), fontsize=6.5, color="#c1121f", clip_on=True,
                          xytext=(2, 6 + 7 * (place % 3)), textcoords="offset points")  # fmt: skip
        # Beyond the largest preset all curves are flat.
        axis.set_xlim(min(p["bytes"] for p in points) / 1e6 * 0.95, presets[-1][0] / 1e6 * 1.12)
        axis.set_ylim(low * 0.98, low * 1.75)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for ticks, step in ((axis.xaxis, 0.5), (axis.yaxis, 2)):
            ticks.set_major_locator(mpl.ticker.MultipleLocator(step))
            ticks.set_minor_locator(mpl.ticker.NullLocator())
            ticks.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(which="both", labelsize=8)
        axis.grid(which="both", color="#e9ecef", linewidth=0.7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        runtime = {"gguf": "GGUF in llama.cpp", "onnx": "ONNX in onnxruntime"}[fmt]
        axis.set_title(f"{model}: {runtime}", fontsize=10, loc="left")
        axis.set_xlabel("file size, MB", fontsize=9)
        axis.set_ylabel("perplexity", fontsize=9)
        axis.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


def save(document: dict[str, Any], out: Path) -> None:
    """One line a point, so that a difference shows what changed."""
    groups = sorted({(point["model"], point["format"]) for point in document["points"]})
    document["comparison"] = {
        f"{model}, {fmt}": comparison([p for p in document["points"] if (p["model"], p["format"]) == (model, fmt)])
        for model, fmt in groups
    }
    head = json.dumps({k: v for k, v in document.items() if k != "points"}, indent=1)
    lines = ",\n  ".join(json.dumps(point) for point in document["points"])
    temporary = out.with_suffix(".tmp")
    temporary.write_text(f'{head[:-2]},\n "points": [\n  {lines}\n ]\n}}\n')
    temporary.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=[ROOT / "samples/llama", ROOT / "samples/qwen3"])
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="one for each model; default: ranked here")
    parser.add_argument("--only", choices=sorted(CASES), help="one format")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the evaluation text")
    parser.add_argument("--quick", action="store_true", help="four budgets, fewer presets, 4,096 tokens")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "presets.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "presets.svg")
    args = parser.parse_args()
    old = json.loads(args.out.read_text()) if args.out.is_file() else {"points": []}
    if args.plot_only:
        plot(old, args.plot)
        return
    tokens = 4_096 if args.quick else args.tokens
    document: dict[str, Any] = {
        "benchmark": "presets",
        "context": CONTEXT,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("onnxruntime", "xllamacpp", "gguf", "torch")},
        "points": old["points"],
    }
    for number, directory in enumerate(args.model):
        checkpoint = Checkpoint.open(directory)
        scores = ranked(checkpoint, args.scores[number] if number < len(args.scores) else None)
        windows = evaluation_text(checkpoint.path, TEXTS / "evaluation.txt", CONTEXT, tokens).windows
        for fmt, case in CASES.items():
            if args.only and fmt != args.only:
                continue
            group, measured = (checkpoint.name, fmt), {p["identity"]: p for p in document["points"]}
            before = [p for p in document["points"] if (p["model"], p["format"]) != group]
            points: list[dict[str, Any]] = []
            shares, presets = (QUICK_SHARES, case["quick"]) if args.quick else (SHARES, case["presets"])
            for name, label, plan in series(checkpoint, scores, fmt, shares, presets):
                key, started = identity(plan, scores, tokens), time.perf_counter()
                losses = measured[key]["losses"] if key in measured else measure(checkpoint, scores, plan, windows)
                points.append(
                    {
                        "model": checkpoint.name,
                        "format": fmt,
                        "series": name,
                        "label": label,
                        "bytes": plan.planned_bytes,
                        "budget": plan.budget_bytes,
                        "perplexity": round(float(np.exp(np.mean(losses))), 4),
                        "predicted": plan.predicted_perplexity and round(plan.predicted_perplexity, 4),
                        "low_rank_layers": sum(t.rank is not None for t in plan.tensors),
                        "tokens": int(windows.shape[0] * (windows.shape[1] - 1)),
                        "identity": key,
                        "losses": losses,
                    }
                )
                measured[key] = points[-1]
                pending = [p for p in old["points"] if (p["model"], p["format"]) == group]
                done = {(p["series"], p["label"]) for p in points}
                document["points"] = [
                    *before, *points, *(p for p in pending if (p["series"], p["label"]) not in done)
                ]  # fmt: skip
                save(document, args.out)
                print(
                    f"{checkpoint.name:8} {fmt:5} {name:15} {label:20} {plan.planned_bytes:>9,} bytes  "
                    f"perplexity {points[-1]['perplexity']:9.3f}  predicted {points[-1]['predicted']:9.3f}  "
                    f"{time.perf_counter() - started:5.1f} s",
                    flush=True,
                )
            document["points"] = [*before, *points]
            save(document, args.out)
    for group, result in document["comparison"].items():
        print(f"{group}: {result['compared']} compared, {len(result['lost'])} lost")
        for loss in result["lost"]:
            print("  ", json.dumps(loss))
    plot(document, args.plot)


if __name__ == "__main__":
    main()
