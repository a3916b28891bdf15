"""The whole way of a model of 1.1 billion parameters on this machine: rank, plan, export, verify, in both formats.

    python -m benchmarks.billion --scratch DIRECTORY [--layers 22]

Random bfloat16 weights of TinyLlama's shape (22 layers, 2048 hidden, FFN 5632, 32 heads, 4 for keys and values, 32,000
tokens) and Python source as text: what it takes is real, what it loses is not. Every step is the command that a user
types, in a process of its own; what a step left is used by the next call. Seconds, peak of its anonymous and of its
resident memory, and what was estimated go to benchmarks/billion.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gguf_export import watched
from benchmarks.random_model import write_random_model

RESULTS = Path(__file__).with_suffix(".json")
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# About 4.5 bits a weight each, with a context of 2,048 tokens.
BUDGETS = {"gguf": "760MB", "onnx": "1200MB"}
# Measuring what classes of layers cost is the same work in both formats, half an hour on two cores.
FLAGS = {"gguf": (), "onnx": ("--no-calibrate",)}
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "gguf", "xllamacpp", "numpy")

KEPT = ("passed", "planned_bytes", "written_bytes")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "acip_export", *map(str, words)]


def estimate(model: Path) -> dict[str, Any]:
    """What the ranking says that it takes, before it begins."""
    words = command("rank", model, "--algorithm", "fisher", "--estimate", "--json", "--no-measure-rounding")
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(layers: int, scratch: Path, steps: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill ``steps``; those that it has, with what they left in ``scratch``, are not done again."""
    model, scores, text = scratch / "model", scratch / "scores.acip", scratch / "text.txt"
    if not model.exists():
        write_random_model(model, {**SHAPE, "num_hidden_layers": layers})
        sources = sorted(Path(json.__file__).parents[1].glob("*.py"))
        words = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sources)
        text.write_text(words[:2_000_000])
    if not scores.exists():
        steps.clear()
        steps["estimate"] = estimate(model)
        flags = ("--data", text, "--algorithm", "fisher", "-o", scores, "--quiet")
        steps["rank"] = watched(command("rank", model, *flags, "--no-measure-rounding"))
        steps["rank"]["score_file_bytes"] = scores.stat().st_size
        save()
    for name, budget in BUDGETS.items():
        out, plan = scratch / name, scratch / f"{name}.json"
        asked: tuple[object, ...] = (
            "--model",
            model,
            "--scores",
            scores,
            "--budget",
            budget,
            "--format",
            name,
            "--context",
            2048,
        )
        asked += FLAGS[name]
        if not plan.exists():
            steps[f"{name} plan"] = watched(command("plan", *asked, "-o", plan, "--quiet"))
            save()
        if not out.exists():
            made = watched(command(*asked, "-o", out, "--quiet", "--accept-loss"))
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            steps[f"{name} export"] = made | {key: report[key] for key in KEPT}
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--scratch", type=Path, required=True, help="where 10 GB may lie, for the next call to go on")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["steps"] if RESULTS.exists() else {}

    def save() -> None:
        result = {
            "shape": {**SHAPE, "num_hidden_layers": arguments.layers},
            "budgets": BUDGETS,
            "flags": FLAGS,
            "steps": steps,
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in PACKAGES},
            "date": time.strftime("%Y-%m-%d"),
        }
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    measure(arguments.layers, arguments.scratch, steps, save)


if __name__ == "__main__":
    main()
