"""A GGUF export beside llama.cpp's two steps: time and memory, same machine, same model, one run each.

    make llama-cpp && python -m benchmarks.gguf_export [--shape NAME] [--sources LLAMA_CPP] [--scratch DIRECTORY]

A random bfloat16 Llama (1b: 16 layers, 2048 hidden, FFN 8192, 32,000 tokens) to Q4_K, all matrices. Ours: from model
directory to export, bundle included. llama.cpp's: ``convert_hf_to_gguf.py --outtype bf16`` of the source package of
llama-cpp-python, then ``llama_model_quantize`` through llama-cpp-python. Both with the same number of threads, once
with importance weights and once without; the quantized tensors are compared byte by byte. Writes the
results for the shape 1b to benchmarks/gguf_export.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.machine import processors
from benchmarks.our_steps import FORMAT
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.ruled_plan import uniform_scores
from converters.gguf.llama_cpp import build as build_llama_cpp

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "gguf_export.json"
# The shape has a vocabulary of its own: 32,000 tokens.
_1B = {**SHAPES["1b"], "vocab_size": 32000}
MODELS = {"1b": _1B, "one-layer": {**_1B, "num_hidden_layers": 1}, "small": SHAPES["small"]}
OUR_STEPS, LLAMA_STEPS = "benchmarks.our_steps", "benchmarks.llama_steps"
# Rounding with importance weights of the columns, as our exports do and llama.cpp with --imatrix, and without.
MODES = ("weighted", "plain")


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


def step(module: str, *arguments: str | Path) -> dict[str, float]:
    return watched([sys.executable, "-m", module, *map(str, arguments)])


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
    from acip_export.api import write_imatrix

    model = scratch / "model"
    checkpoint = write_random_model(model, MODELS[shape])
    imatrix = scratch / "imatrix.gguf"
    write_imatrix(checkpoint, uniform_scores(checkpoint), imatrix)
    llama = sources or build_llama_cpp.sources(scratch, lambda line: print(line, file=sys.stderr))
    llama = llama / "vendor" / "llama.cpp" if (llama / "vendor").is_dir() else llama
    whole = scratch / "bf16.gguf"
    converting = step(LLAMA_STEPS, "convert", llama, model, whole)
    modes = {}
    for mode in MODES:
        mine, quantized = scratch / mode / "model.gguf", scratch / f"{mode}.gguf"
        ours = step(OUR_STEPS, model, mine.parent, mode)
        quantizing = step(LLAMA_STEPS, "quantize", whole, quantized, *([imatrix] if mode == "weighted" else []))
        modes[mode] = compared(ours, converting, quantizing, mine, quantized)
        mine.unlink()
        quantized.unlink()
    return {"shape": MODELS[shape], "type": FORMAT, "threads": processors(), **modes}


def compared(
    ours: dict[str, float], converting: dict[str, float], quantizing: dict[str, float], mine: Path, quantized: Path
) -> dict[str, Any]:
    steps = (converting, quantizing)
    both = {key: sum(row[key] for row in steps) if "seconds" in key else max(row[key] for row in steps) for key in ours}
    return {
        "bytes": mine.stat().st_size,
        "bytes_llama_cpp": quantized.stat().st_size,
        "differing_tensors": differing(mine, quantized),
        "rows": {
            "ours": ours,
            "llama.cpp, convert": converting,
            "llama.cpp, quantize": quantizing,
            "llama.cpp, both steps": both,
        },
        "times_as_fast": both["seconds"] / ours["seconds"],
        "times_as_fast_by_processor": both["processor_seconds"] / ours["processor_seconds"],
        "share_of_peak_anonymous": ours["peak_anonymous_bytes"] / both["peak_anonymous_bytes"],
        "share_of_peak_resident": ours["peak_resident_bytes"] / both["peak_resident_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="1b")
    parser.add_argument("--sources", type=Path, help="a llama.cpp checkout; default: fetched with pip")
    parser.add_argument("--scratch", type=Path, help="where 8 GB may lie for a while")
    arguments = parser.parse_args()
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
