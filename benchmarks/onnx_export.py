"""ONNX exports beside the stock model builder's: time and memory of writing, and speed of what low rank saves.

    python -m benchmarks.onnx_export [--parts write speed] [--scratch DIRECTORY]

``write``: a random bfloat16 Llama of the shape of Llama 3.2 1B, all matrices to int4 in blocks of 32; ours from model
directory to export (bundle included), against ``onnxruntime_genai.models.builder``. ``speed``: two layers of that
shape, dense int4 against factor pairs in int4 with 0.8, 0.6 and 0.5 of the layers' bytes, in turns in one process.
Writes benchmarks/onnx_export.json; parts that are not run again stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, Serving, TensorDecision, decision_bytes
from acip_export.artifacts.scores import ScoreFile
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.ruled_plan import ruled_plan, uniform_scores

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "onnx_export.json"
FORMAT, BLOCK = "int4", 32
RATIOS = (0.8, 0.6, 0.5)
CONTEXT, PROMPT, NEW, ROUNDS = 512, 192, 48, 5


def decisions(checkpoint: Checkpoint, ratio: float | None) -> tuple[TensorDecision, ...]:
    """All matrices dense in int4, or the layers' as pairs that have ``ratio`` of those bytes."""
    made = []
    for name, info in checkpoint.tensors.items():
        fields: dict[str, Any] = {"representation": "dense", "type": FORMAT if len(info.shape) == 2 else "f32"}
        if ratio is not None and name.removesuffix(".weight") in checkpoint.linear_modules:
            rows, columns = info.shape
            rank = max(BLOCK, round(ratio * rows * columns / (rows + columns) / BLOCK) * BLOCK)
            fields = {"representation": "factored", "rank": rank, "kept": ((0, rank),)}
            fields |= {"up_type": FORMAT, "down_type": FORMAT}
        draft = TensorDecision(name, info.shape, nbytes=0, **fields)
        made.append(TensorDecision(name, info.shape, nbytes=decision_bytes(draft, "onnx"), **fields))
    return tuple(made)


def make_plan(checkpoint: Checkpoint, ratio: float | None) -> Plan:
    return ruled_plan(checkpoint, "onnx", "factored", Serving(CONTEXT, "f32", 256), decisions(checkpoint, ratio))


def make_scores(checkpoint: Checkpoint) -> ScoreFile:
    """Uniform statistics: matrices are rounded plainly, as the stock builder does, and factors are those of the SVD."""
    return uniform_scores(checkpoint, lambda count: np.geomspace(1, 1e-3, count).astype(np.float32))


def ours(model: Path, out: Path, ratio: float | None = None) -> None:
    """Model directory to export; the bundle lies beside it and is removed."""
    from converters.onnx import converter

    checkpoint, bundle = Checkpoint.open(model), out.with_suffix(".bundle")
    materialize_bundle(checkpoint, make_scores(checkpoint), make_plan(checkpoint, ratio), bundle)
    out.mkdir()
    converter.convert(Bundle.open(bundle), out, lambda _: None)
    shutil.rmtree(bundle)


def watched(command: list[str]) -> dict[str, float]:
    """Runs a command; seconds, and the peak of its resident and of its anonymous memory in bytes.

    Pages of mapped files count as resident although the system takes them back at will, so both are told.
    """
    started, anonymous = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        except (OSError, IndexError):
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - started, "peak_anonymous_bytes": anonymous, "peak_resident_so_far": peak}


def directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def write_part(scratch: Path) -> dict[str, Any]:
    model = scratch / "1b"
    write_random_model(model, SHAPES["1b"])
    stock = ["-i", str(model), "-o", str(scratch / "stock"), "-c", str(scratch / "cache"), "-p", "int4", "-e", "cpu"]
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.onnx_export", "--write-ours", str(model), str(scratch / "ours")],
        # Ours first: the peak that the system keeps is that of the largest child so far.
        "stock builder": [sys.executable, "-m", "onnxruntime_genai.models.builder", *stock],
    }
    base = watched([sys.executable, "-c", "import torch, transformers"])
    rows: dict[str, Any] = {}
    for name, command in commands.items():
        rows[name] = watched(command)
        out = scratch / ("ours" if name == "ours" else "stock")
        rows[name]["bytes"] = directory_bytes(out)
        rows[name]["peak_resident_bytes"] = rows[name].pop("peak_resident_so_far")
        shutil.rmtree(out)
        print(name, rows[name])
    shutil.rmtree(model)
    mine, theirs = rows["ours"], rows["stock builder"]
    return {
        "shape": SHAPES["1b"],
        "base_anonymous_bytes": base["peak_anonymous_bytes"],
        "rows": rows,
        "times_as_fast": theirs["seconds"] / mine["seconds"],
        "share_of_peak_anonymous": mine["peak_anonymous_bytes"] / theirs["peak_anonymous_bytes"],
        "share_of_peak_resident": mine["peak_resident_bytes"] / theirs["peak_resident_bytes"],
    }


def speed_part(scratch: Path) -> dict[str, Any]:
    import onnxruntime_genai as genai

    model = scratch / "layers"
    checkpoint = write_random_model(model, {**SHAPES["1b"], "num_hidden_layers": 2, "vocab_size": 4096})
    cases: dict[str, float | None] = {"dense": None, **{f"{ratio:g} of the bytes": ratio for ratio in RATIOS}}
    generators: dict[str, Any] = {}
    layer_bytes: dict[str, int] = {}
    for name, ratio in cases.items():
        out = scratch / f"speed-{len(generators)}"
        ours(model, out, ratio)
        layers = [d for d in decisions(checkpoint, ratio) if d.module in checkpoint.linear_modules]
        layer_bytes[name] = sum(d.nbytes for d in layers)
        generators[name] = genai.Model(str(out))

    def once(loaded: Any) -> tuple[float, float]:
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(do_sample=False, min_length=PROMPT + NEW, max_length=CONTEXT)
        generator = genai.Generator(loaded, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.arange(PROMPT, dtype=np.int32) % 1000 + 10)
        middle = time.perf_counter()
        for _ in range(NEW):
            generator.generate_next_token()
        return middle - started, time.perf_counter() - middle

    for loaded in generators.values():
        once(loaded)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for all of them
        for name, loaded in generators.items():
            measured[name].append(once(loaded))
    best = {name: [min(values) for values in zip(*runs, strict=True)] for name, runs in measured.items()}
    rows = {
        name: {
            "layer_bytes": layer_bytes[name],
            "bytes_ratio": layer_bytes[name] / layer_bytes["dense"],
            "prefill_tokens_per_second": PROMPT / best[name][0],
            "decode_tokens_per_second": NEW / best[name][1],
            "prefill_times_dense": best["dense"][0] / best[name][0],
            "decode_times_dense": best["dense"][1] / best[name][1],
            "decode_spread": statistics.pstdev([d for _, d in measured[name]]) / best[name][1],
        }
        for name in cases
    }
    for name, row in rows.items():
        print(name, row)
    return {"layers": 2, "prompt": PROMPT, "new_tokens": NEW, "rounds": ROUNDS, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["write", "speed"], default=["write", "speed"])
    parser.add_argument("--scratch", type=Path, help="where a few gigabytes may lie for a while")
    parser.add_argument("--write-ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_ours:
        ours(*arguments.write_ours)
        return
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for part in arguments.parts:
            result[part] = {"write": write_part, "speed": speed_part}[part](Path(scratch))
            packages = ("acip-export", "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch")
            result["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
            result["versions"] = {name: version(name) for name in packages}
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
