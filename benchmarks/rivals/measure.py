"""A process that opens one file of any tool in its runtime: what that takes, how fast it is, how far from dense it is.

    python -m benchmarks.rivals.measure FORMAT EXPORT WINDOWS DENSE RESULT

FORMAT is gguf or onnx; EXPORT a directory as the runtime opens it; WINDOWS and DENSE are .npy files: token windows and
the dense model's logits for them; RESULT is the JSON file to write. Speed and memory come first, as a plan is measured
(:mod:`acip_export.verification.probe`), so that the comparison's arrays are not in them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.verification.metrics import compare_with_dense, token_figures
from acip_export.verification.probe import resident, spread_tokens

SESSIONS = {
    "gguf": ("converters.gguf.runtimes.llama_cpp", "LlamaCppSession", "f16"),
    "onnx": ("converters.onnx.runtimes.genai", "GenaiSession", "f32"),
}
NEW_TOKENS, REPETITIONS = 32, 2


def measure(fmt: str, export: Path, windows: np.ndarray[Any, Any], dense: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The figures of one file. Logits of padded vocabularies are cut to the dense model's."""
    module, name, cache_type = SESSIONS[fmt]
    context = windows.shape[1]
    session_class = getattr(import_module(module), name)
    before = resident("VmRSS")
    with session_class(export, Serving(context, cache_type, context)) as session:
        prompt = spread_tokens(dense.shape[-1], context - NEW_TOKENS)
        speeds = [session.speed(prompt, NEW_TOKENS)]
        peak = resident("VmHWM")
        speeds += [session.speed(prompt, NEW_TOKENS) for _ in range(REPETITIONS - 1)]
        figures = [
            token_figures(expected, found[:, : dense.shape[-1]], window)
            for expected, found, window in zip(dense, session.logits(windows), windows, strict=True)
        ]
        before_perplexity, after, divergence = compare_with_dense(figures)
        return {
            **asdict(divergence),
            "perplexity": after.perplexity,
            "dense_perplexity": before_perplexity.perplexity,
            "runtime": session.name,
            "prefill_tokens_per_second": round(max(speed.prefill for speed in speeds), 1),
            "decode_tokens_per_second": round(max(speed.decode or 0.0 for speed in speeds), 1),
            "memory_bytes": None if before is None or peak is None else peak[0] - before[0],
        }


def main() -> None:
    fmt, export, windows, dense, result = sys.argv[1:]
    figures = measure(fmt, Path(export), np.load(windows), np.load(dense, mmap_mode="r"))
    Path(result).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
