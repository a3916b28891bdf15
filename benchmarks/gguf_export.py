"""A GGUF export beside llama.cpp's two steps: time and memory, same machine, same model, one run each.

    make llama-cpp && python benchmarks/gguf_export.py [--shape NAME] [--sources LLAMA_CPP] [--scratch DIRECTORY]

A random bfloat16 Llama (1b: 16 layers, 2048 hidden, FFN 8192, 32,000 tokens) to Q4_K, all matrices. Ours: from model
directory to export, bundle included. llama.cpp's: ``convert_hf_to_gguf.py --outtype bf16`` of the source package of
llama-cpp-python, then ``llama_model_quantize`` through llama-cpp-python. Both with the same number of threads; the
quantized tensors are compared byte by byte. Writes benchmarks/gguf_export.json (of the shape 1b only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from random_model import SHAPES, write_random_model
from ruled_plan import ruled_plan

from acip_export.bundle import Bundle
from acip_export.checkpoint import Checkpoint
from acip_export.materialize import materialize_bundle
from acip_export.plans import Plan, Runtime, TensorDecision, decision_bytes
from acip_export.scores import CurvePoint, ModuleScores, ScoreFile
from converters.gguf import build_llama_cpp
from converters.gguf.ggml import processors

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "gguf_export.json"
FORMAT = "q4_k"
# The shape has a vocabulary of its own: 32,000 tokens.
_1B = {**SHAPES["1b"], "vocab_size": 32000}
MODELS = {"1b": _1B, "one-layer": {**_1B, "num_hidden_layers": 1}, "small": SHAPES["small"]}
STEPS = Path(__file__).with_name("llama_steps.py")


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Every matrix in one type."""
    decisions = []
    for name, info in checkpoint.tensors.items():
        form = FORMAT if len(info.shape) == 2 else "f32"
        draft = TensorDecision(name, info.shape, "dense", 0, form)
        decisions.append(TensorDecision(name, info.shape, "dense", decision_bytes(draft, "gguf"), form))
    return ruled_plan(checkpoint, "gguf", "stock", Runtime(512, "f16", 256), tuple(decisions))


def make_scores(checkpoint: Checkpoint) -> ScoreFile:
    """Uniform statistics: both sides round with the importance one of every column."""
    modules = {}
    for name, shape in checkpoint.linear_modules.items():
        flat = np.ones(min(shape), np.float32)
        moments = np.ones(shape[1], np.float32), np.ones(shape[0], np.float32)
        modules[name] = ModuleScores(shape, flat, flat, flat, flat, 1.0, *moments)
    return ScoreFile(
        model={"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        algorithm={"name": "magnitude", "basis": "svd", "seed": 0},
        data={"source": "none", "sha256": "0" * 64, "tokens": 1},
        versions={"acip-export": version("acip-export")},
        curve=(CurvePoint(1.0, 3.0), CurvePoint(0.5, 4.0)),
        modules=modules,
        embedding_sensitivity={},
        second_moments={},
    )


def ours(model: Path, out: Path) -> None:
    """Model directory to export; the bundle lies beside it and is removed."""
    from converters.gguf import converter

    checkpoint, bundle = Checkpoint.open(model), out.with_suffix(".bundle")
    materialize_bundle(checkpoint, make_scores(checkpoint), make_plan(checkpoint), bundle)
    out.mkdir()
    converter.convert(Bundle.open(bundle), out, lambda _: None)
    shutil.rmtree(bundle)


def watched(command: list[str]) -> dict[str, float]:
    """Runs a command; seconds, processor seconds, and the peaks of its resident and of its anonymous memory in bytes.

    Pages of mapped files count as resident although the system takes them back at will, so both are told.
    """
    anonymous, before, started = 0, resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    resident = 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                anonymous = max(anonymous, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
                resident = max(resident, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
            except (OSError, IndexError):
                pass
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            tail = said.read().decode(errors="replace")[-4000:]
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
    }


def step(name: str, *files: Path) -> dict[str, float]:
    return watched([sys.executable, str(STEPS), name, *map(str, files)])


def differing(mine: Path, other: Path) -> list[str]:
    """Names of the tensors whose type or bytes differ."""
    import gguf

    found, expected = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (mine, other))
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or found[name].tensor_type != expected[name].tensor_type
        or not np.array_equal(found[name].data, expected[name].data)
    )


def measure(shape: str, sources: Path | None, scratch: Path) -> dict[str, Any]:
    from acip_export.pipeline import write_imatrix

    model = scratch / "model"
    checkpoint = write_random_model(model, MODELS[shape])
    imatrix = scratch / "imatrix.gguf"
    write_imatrix(checkpoint, make_scores(checkpoint), imatrix)
    llama = sources or build_llama_cpp.sources(scratch, lambda line: print(line, file=sys.stderr))
    llama = llama / "vendor" / "llama.cpp" if (llama / "vendor").is_dir() else llama
    whole, quantized = scratch / "bf16.gguf", scratch / "quantized.gguf"
    rows = {
        "ours": watched([sys.executable, __file__, "--ours", str(model), str(scratch / "ours")]),
        "llama.cpp, convert": step("convert", llama, model, whole),
        "llama.cpp, quantize": step("quantize", whole, quantized, imatrix),
    }
    mine = scratch / "ours" / "model.gguf"
    steps = [rows["llama.cpp, convert"], rows["llama.cpp, quantize"]]
    both = {
        key: sum(row[key] for row in steps) if "seconds" in key else max(row[key] for row in steps) for key in steps[0]
    }
    return {
        "shape": MODELS[shape],
        "format": FORMAT,
        "threads": processors(),
        "bytes": mine.stat().st_size,
        "bytes_llama_cpp": quantized.stat().st_size,
        "differing_tensors": differing(mine, quantized),
        "rows": {**rows, "llama.cpp, both steps": both},
        "times_as_fast": both["seconds"] / rows["ours"]["seconds"],
        "share_of_peak_anonymous": rows["ours"]["peak_anonymous_bytes"] / both["peak_anonymous_bytes"],
        "share_of_peak_resident": rows["ours"]["peak_resident_bytes"] / both["peak_resident_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="1b")
    parser.add_argument("--sources", type=Path, help="a llama.cpp checkout; default: fetched with pip")
    parser.add_argument("--scratch", type=Path, help="where 8 GB may lie for a while")
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        ours(*arguments.ours)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = measure(arguments.shape, arguments.sources, Path(scratch))
    packages = ("acip-export", "gguf", "xllamacpp", "llama-cpp-python", "torch")
    result["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
    result["versions"] = {name: version(name) for name in packages}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.shape == "1b":
        RESULT.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
