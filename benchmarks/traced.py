"""What tracing costs: one Llama as the model builder's graph, and as torch.onnx traces it, fused and not.

    python -m benchmarks.traced

Random weights in int4, one thread, interleaved, the best of several; a busy machine, so ratios only. Writes
benchmarks/traced.json.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.onnx import companion_files as consumers
from converters.onnx import converter
from converters.onnx.graph import marked as kept
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from converters.onnx.tracing import trace as marked
from tests.support import dense, make_bundle, make_model, make_plan

RESULT = Path(__file__).with_suffix(".json")
SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
CONTEXT, PROMPT, NEW, ROUNDS = 512, 256, 64, 5


def export(kind: str, model: Path, place: Path) -> tuple[Path, float]:
    """The export's directory, and the seconds that writing it took."""
    if kind != "builder":
        converter.has_builder = lambda checkpoint: False  # noqa: ARG005 - the name is part of the type
    if kind == "traced, plain attention":
        marked._is_fusible = lambda *_: False
    plan = make_plan(model, "onnx", "factored", dense(type="int4"), CONTEXT, PROMPT)
    bundle = make_bundle(model, plan, place / "bundle")
    out = place / "export"
    out.mkdir()
    start = time.perf_counter()
    converter.convert(bundle, out, lambda _: None)
    seconds = time.perf_counter() - start
    if kind == "traced, plain attention":
        file = out / consumers.GENAI_CONFIG
        settings = json.loads(file.read_text())
        settings["search"]["past_present_share_buffer"] = False
        file.write_text(json.dumps(settings))
    return out, seconds


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", "llama", max_position_embeddings=CONTEXT, **SIZES, **HEADS)
        sessions = {}
        for kind in ("builder", "traced", "traced, plain attention"):
            # No trace of an earlier run: that costs seconds, and the third case would read the second's.
            os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / kind.replace(" ", "-"))
            kept._marked_graph.cache_clear()
            place = Path(scratch) / f"made-{kind.replace(' ', '-')}"
            place.mkdir()
            out, seconds = export(kind, model, place)
            plan = make_plan(model, "onnx", "factored", dense(type="int4"), CONTEXT, PROMPT)
            sessions[kind] = OnnxRuntimeSession(out, plan.serving, threads=1)
            graph = (out / consumers.MODEL_FILE).stat().st_size
            rows.append({"graph": kind, "writing_s": seconds, "graph_bytes": graph, "prefill": 0.0, "decode": 0.0})
        prompt = [index % 4096 for index in range(PROMPT)]
        for _ in range(ROUNDS):
            for row in rows:
                speed = sessions[str(row["graph"])].speed(prompt, NEW)
                row["prefill"] = max(float(row["prefill"]), speed.prefill)
                row["decode"] = max(float(row["decode"]), speed.decode or 0.0)
    document = {
        "benchmark": "traced",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers", "onnxscript")},
        "model": {**SIZES, **HEADS, "prompt": PROMPT, "new_tokens": NEW},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
