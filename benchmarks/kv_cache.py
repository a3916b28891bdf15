"""Types of onnxruntime's KV cache: memory of a process that fills its context, tokens per second there, and loss.

    python -m benchmarks.kv_cache [--only narrow wide loss] [--update-docs]

Writes benchmarks/kv_cache.json; the table of docs/memory.md with --update-docs. Of random models in onnxruntime-genai,
with the cache shared by past and present, as exports have it, and with one of each, as its model builder writes rounded
caches for processors. The loss is that of the trained samples, of the rest of the text that they were trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from acip_export.api import convert_bundle
from acip_export.artifacts.plan import Serving, save_plan
from acip_export.formats.registry import export_format
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.memory import uncounted_bytes
from acip_export.text.packing import load_tokenizer
from acip_export.units import format_bytes
from acip_export.verification.metrics import compare_logits
from acip_export.verification.process import measure_process
from benchmarks.memory import Case, made_up_scores, make_plan, warm_libraries, with_memory
from benchmarks.random_model import SHAPES, write_random_model
from converters.onnx.companion_files import GENAI_CONFIG
from samples.marked import with_marked

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("onnxruntime", "onnxruntime-genai")
ONNX = export_format("onnx")
SESSION = next(session for session in ONNX.sessions if session.runtime == "onnxruntime-genai")
MODELS: dict[str, dict[str, Any]] = {
    "narrow": {**SHAPES["small"], "num_key_value_heads": 4},
    "wide": {**SHAPES["small"], "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 8},
}
# Contexts and prompt batches.
RUNS = {"narrow": ((2048, 256), (8192, 64)), "wide": ((4096, 128),)}
LOSS, SAMPLES, WINDOWS, TOKENS = "loss", ("llama", "qwen3"), 4, 512


def measured(name: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """A model with every type, at every context and prompt batch."""
    checkpoint = write_random_model(scratch / "model", MODELS[name], context=max(context for context, _ in RUNS[name]))
    scores = made_up_scores(checkpoint, scratch / "scores.acip")
    export = scratch / "export"
    for context, batch in RUNS[name]:
        for cache_type in ONNX.cache_types:
            serving = Serving(context, cache_type, batch)
            plan = make_plan(checkpoint, Case("onnx", "factored", "int8", "int8"), serving)
            materialize_bundle(checkpoint, scores, plan, scratch / "bundle", force=True)
            shutil.rmtree(export, ignore_errors=True)
            convert_bundle(scratch / "bundle", export)
            plan = with_memory(plan, checkpoint, serving)
            save_plan(plan, export / "plan.json", force=True)
            for shared in (True, False) if cache_type != "f32" else (True,):
                share(export, shared)
                figures = measure_process(SESSION.module, SESSION.name, export)
                assert figures.memory is not None
                predicted = plan.memory_bytes + uncounted_bytes(ONNX, plan, checkpoint, SESSION.runtime)
                row = {
                    "model": name,
                    "context": context,
                    "prompt_batch": batch,
                    "cache_type": cache_type,
                    "shared": shared,
                    "kv_cache": plan.breakdown["kv_cache"],
                    "predicted": predicted,
                    "measured": figures.memory.peak_bytes,
                    "prompt": figures.speed.prefill,
                    "answer": figures.speed.decode,
                }
                print(json.dumps(row), flush=True)
                yield row


def share(export: Path, shared: bool) -> None:
    """Have onnxruntime-genai keep one cache, or past and present apart."""
    file = export / GENAI_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["search"]["past_present_share_buffer"] = shared
    file.write_text(json.dumps(config), encoding="utf-8")


def losses(name: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """A trained sample in floats with every type, against itself with the first."""
    model = ROOT / "samples" / name
    checkpoint = Checkpoint.open(model)
    scores = made_up_scores(checkpoint, scratch / "scores.acip")
    text = (ROOT / "samples" / "text" / "evaluation.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(model)(text, return_tensors="np")["input_ids"][0]
    windows = ids[: WINDOWS * TOKENS].reshape(WINDOWS, TOKENS)
    reference = None
    for cache_type in ONNX.cache_types:
        serving = Serving(TOKENS, cache_type, 64)
        plan = replace(make_plan(checkpoint, Case("onnx", "factored", "f32", "f32"), serving), serving=serving)
        materialize_bundle(checkpoint, scores, plan, scratch / "bundle", force=True)
        convert_bundle(scratch / "bundle", scratch / "export", force=True)
        with SESSION.open(scratch / "export", serving) as session:
            logits = list(session.logits(windows))
        reference = reference or logits
        row = {
            "model": name,
            "cache_type": cache_type,
            "tokens": windows.size,
            "kl": compare_logits(reference, iter(logits), ([], [])).mean_kl,
        }
        print(json.dumps(row), flush=True)
        yield row


def table(document: dict[str, Any]) -> str:
    """The table of docs/memory.md."""
    lines = [
        "| model, context, batch | type | cache | predicted | measured | past and present apart |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    apart = {key(r): r["measured"] for r in document["rows"] if not r["shared"]}
    for r in document["rows"]:
        if r["shared"]:
            other = format_bytes(apart[key(r)]) if key(r) in apart else ""
            lines.append(
                f"| {r['model']}, {r['context']}, {r['prompt_batch']} | {r['cache_type']} | "
                f"{format_bytes(r['kv_cache'])} | {format_bytes(r['predicted'])} | "
                f"{format_bytes(r['measured'])} | {other} |"
            )
    return "\n".join(lines)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "context", "prompt_batch", "cache_type"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*MODELS, LOSS], default=[*MODELS, LOSS])
    parser.add_argument("--scratch", type=Path, help="where models are made; default: the system's temporary directory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kv_cache.json")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()
    document = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": [], "losses": []}
    warm_libraries()
    for name in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
            scratch = Path(directory)
            if name == LOSS:
                document["losses"] = [row for sample in SAMPLES for row in losses(sample, scratch)]
                shutil.rmtree(scratch / "export")
            else:
                document["rows"] = [r for r in document["rows"] if r["model"] != name] + list(measured(name, scratch))
    document = {
        "benchmark": "kv_cache",
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in PACKAGES},
        "rows": document["rows"],
        "losses": document["losses"],
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.update_docs:
        file = ROOT / "docs" / "memory.md"
        file.write_text(with_marked(file.read_text(encoding="utf-8"), "cache table", table(document)), encoding="utf-8")


if __name__ == "__main__":
    main()
