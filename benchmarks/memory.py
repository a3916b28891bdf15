"""What a plan predicts for a process, against the peak resident memory of one that loads, fills its context, generates.

    python -m benchmarks.memory [--only sample 100m 1b smollm2] [--scratch DIRECTORY]

Writes benchmarks/memory.json; prints the table of docs/memory.md with --update-docs into it. The models of 135 million
and 1.2 billion parameters have random weights (benchmarks/random_model.py) and are deleted afterwards. The largest
takes 8 GB of disk and 2 GiB of memory. Of smollm2, the real model of ``make real-model``, the planner mixes the types,
for three budgets from near the smallest to near the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.api import convert_bundle
from acip_export.artifacts.plan import RUNTIME_PARTS, Plan, Serving, TensorDecision, decision_bytes, save_plan
from acip_export.artifacts.scores import (
    CurvePoint,
    ModuleScores,
    RankedModel,
    RankedOn,
    ScoreFile,
    load_scores,
    save_scores,
)
from acip_export.formats.registry import export_format
from acip_export.lowrank.moments import PackedMoment, is_projected
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of
from acip_export.planning import Budget, PlanRequest, Problem, resolve
from acip_export.planning.memory import ModelMemory, uncounted_bytes
from acip_export.units import format_bytes
from acip_export.verification.process import ProcessFigures, measure_process
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.ruled_plan import ruled_plan
from samples import real
from samples.marked import with_marked

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("xllamacpp", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class Case:
    """One export: formats of the layers and of the embedding, rank of the layers (0: dense), and how it is run."""

    format: str
    layout: str
    layers: str
    embedding: str
    rank: int = 0
    runs: tuple[Serving, ...] = ()

    @property
    def types(self) -> str:
        """Of the layers and of the embedding, as the table names them."""
        return f"{self.layers}, {self.embedding}" + (f", rank {self.rank}" if self.rank else "")


CASES: dict[str, tuple[Case, ...]] = {
    "sample": (
        Case("gguf", "stock", "q8_0", "q8_0", runs=(Serving(256, "f16", 64), Serving(512, "q8_0", 32))),
        Case("gguf", "lora", "q8_0", "q8_0", rank=64, runs=(Serving(256, "f16", 64),)),
        Case("onnx", "factored", "int8", "int8", rank=64, runs=(Serving(256, "f32", 32),)),
        Case("onnx", "factored", "int4", "int4-b128", runs=(Serving(512, "f32", 64),)),
        Case("onnx", "factored", "f32", "f32", runs=(Serving(256, "f32", 32),)),
    ),
    "100m": (
        Case("gguf", "stock", "q4_0", "q8_0", runs=(Serving(1024, "f16", 256), Serving(2048, "q8_0", 64))),
        Case("gguf", "lora", "q8_0", "q8_0", rank=96, runs=(Serving(512, "f16", 128),)),
        Case("onnx", "factored", "int4-b64", "int8", runs=(Serving(512, "f32", 128),)),
        Case("onnx", "factored", "int8", "int8", rank=128, runs=(Serving(1024, "f32", 64),)),
    ),
    "1b": (
        Case("gguf", "stock", "q4_0", "q8_0", runs=(Serving(1024, "f16", 256), Serving(2048, "q8_0", 128))),
        Case("onnx", "factored", "int4", "int8", runs=(Serving(512, "f32", 64),)),
    ),
}
# Of the real model: contexts, and where between the smallest and the largest plan budgets lie (equal factors).
REAL, REAL_CONTEXTS, REAL_BUDGETS = "smollm2", (512, 2048), (0.15, 0.5, 0.85)


def warm_libraries() -> None:
    """Read the runtimes' code: how much of it becomes resident depends on what the page cache holds, and how.

    Read ahead, it lies there in large pages, of which a process holds megabytes more. So it is let go of first, then
    read page by page.
    """
    for package in ("xllamacpp", "onnxruntime", "onnxruntime_genai"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for library in Path(next(iter(spec.submodule_search_locations))).rglob("*.so*"):
            with library.open("rb", buffering=0) as file:
                for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM):
                    os.posix_fadvise(file.fileno(), 0, 0, advice)
                while file.read(os.sysconf("SC_PAGE_SIZE")):
                    pass


def made_up_scores(checkpoint: Checkpoint, file: Path, moments: bool = False) -> ScoreFile:
    """A score file that says nothing: memory does not depend on the numbers.

    Args:
        moments: second moments of each layer's inputs and output gradients, of random numbers too.
    """
    modules = {}
    second: dict[str, PackedMoment] = {}
    for name, shape in checkpoint.linear_modules.items():
        flat = np.linspace(2, 1, min(shape), dtype=np.float32)
        modules[name] = ModuleScores(
            shape=shape,
            scores=flat,
            drop_loss=flat,
            up_sensitivity=flat,
            down_sensitivity=flat,
            sensitivity=1.0,
            input_moment=np.ones(shape[1], np.float32),
            gradient_moment=np.ones(shape[0], np.float32),
            input_key=_moment_of_inputs(name, shape[1], second) if moments else "",
            gradient_key=_moment_of_gradients(name, shape, second) if moments else "",
            adapter_a=None,
            adapter_b=None,
        )
    scores = ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "magnitude", "basis": "svd", "seed": 0},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={},
        curve=(CurvePoint(1.0, 0.0),),
        modules=modules,
        embedding_sensitivity={},
        second_moments=second,
    )
    save_scores(scores, file, force=True)
    return load_scores(file)


def _moment_of_inputs(module: str, inputs: int, known: dict[str, PackedMoment]) -> str:
    """Add a packed second moment, and return its key; layers of one input share it."""
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    parent, _, last = module.rpartition(".")
    key = f"{parent}.{shared.get(last, last)}"
    if key not in known:
        known[key] = _random_moment(inputs, len(known))
    return key


def _moment_of_gradients(module: str, shape: tuple[int, int], known: dict[str, PackedMoment]) -> str:
    """Add a packed second moment of output gradients where rows make up for each other by it, and return its key."""
    if is_projected(shape):
        return ""
    known[f"{module}.gradient"] = _random_moment(shape[0], len(known))
    return f"{module}.gradient"


def _random_moment(size: int, seed: int) -> PackedMoment:
    numbers = np.random.default_rng(seed)
    codes = np.clip(np.rint(numbers.standard_normal(size * (size - 1) // 2, np.float32) * 10), -127, 127).astype(
        np.int8
    )
    stream = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    packed = np.frombuffer(stream.compress(codes.tobytes()) + stream.flush(), np.uint8)
    ones = np.ones(size, np.float32)
    # Entries of the inverse's factor that are small beside its diagonal: well conditioned, as real ones are.
    return PackedMoment.of(np.stack([ones, ones, ones / (100 * size**0.5)]), packed)


def make_plan(checkpoint: Checkpoint, case: Case, serving: Serving) -> Plan:
    """Every layer alike; files and memory as the planner predicts them."""
    decisions = []
    for name, info in checkpoint.tensors.items():
        fields: dict[str, Any] = {"representation": "dense", "type": "f32"}
        if len(info.shape) == 2:
            embedding = "embed_tokens" in name or "lm_head" in name
            fields["type"] = case.embedding if embedding else case.layers
            rank = min(case.rank, *info.shape)
            if rank and not embedding:
                fields = {
                    "representation": "lora" if case.layout == "lora" else "factored",
                    "type": "q1_0" if case.layout == "lora" else None,
                    "rank": rank,
                    "up_type": case.layers,
                    "down_type": case.layers,
                    "kept": ((0, rank),),
                }
        draft = TensorDecision(name, info.shape, nbytes=0, **fields)
        decisions.append(replace(draft, nbytes=decision_bytes(draft, case.format)))
    tensors = tuple(decisions)
    files = export_format(case.format).predict_files(checkpoint, case.layout, tensors, serving)
    plan = ruled_plan(checkpoint, case.format, case.layout, serving, tensors, files)
    return with_memory(plan, checkpoint, serving)


def with_memory(plan: Plan, checkpoint: Checkpoint, serving: Serving) -> Plan:
    memory = ModelMemory.of(export_format(plan.format), checkpoint)
    breakdown = memory.breakdown(plan.tensors, plan.planned_bytes, serving)
    own = sum(breakdown[part] for part in RUNTIME_PARTS)
    return replace(
        plan,
        serving=serving,
        breakdown=breakdown,
        anonymous=memory.anonymous(plan.tensors, serving),
        memory_bytes=sum(breakdown.values()) - own,
    )


def measure(name: str, checkpoint: Checkpoint, scratch: Path) -> Iterator[dict[str, Any]]:
    """Every case of a shape: convert, run, compare."""
    scores = made_up_scores(checkpoint, scratch / "scores.acip")
    for case in CASES[name]:
        bundle, export = scratch / "bundle", scratch / "export"
        converted: Plan | None = None
        for runtime in case.runs:
            if converted is None or case.format == "onnx":  # an ONNX export knows its context
                converted = make_plan(checkpoint, case, runtime)
                materialize_bundle(checkpoint, scores, converted, bundle, force=True)
                convert_bundle(bundle, export, force=True)
                shutil.rmtree(bundle)
            plan = with_memory(converted, checkpoint, runtime)
            save_plan(plan, export / "plan.json", force=True)
            known = export_format(case.format)
            for session in known.sessions:
                predicted = plan.memory_bytes + uncounted_bytes(known, plan, checkpoint, session.runtime)
                yield row(name, case.types, plan, predicted, measure_process(session.module, session.name, export))
        shutil.rmtree(export)


def measure_planned(
    name: str, checkpoint: Checkpoint, scratch: Path, contexts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """ONNX plans of the planner's own, which mix types: convert, run, compare. What weights are does not matter."""
    scores, known = made_up_scores(checkpoint, scratch / "scores.acip"), export_format("onnx")
    for context in contexts:
        question = resolve(PlanRequest("onnx", context=context), checkpoint)
        # Pairs are measured above, and take a decomposition each.
        problem = Problem.of(checkpoint, scores, question.space).only(lambda _, decision: decision.rank is None)
        # What the smallest and the largest plan take at a prompt batch of the middle; each budget chooses its own.
        serving = question.rule.serving(Budget(checkpoint.weight_bytes, "memory"), problem.memory)
        smallest, largest = problem.floor("memory", serving).nbytes, problem.largest("memory", serving).memory_bytes
        for share in REAL_BUDGETS:
            budget = Budget(round(smallest * (largest / smallest) ** share), "memory")
            plan = problem.plan(budget, question.rule.serving(budget, problem.memory), exact=False)
            bundle, export = scratch / "bundle", scratch / "export"
            materialize_bundle(checkpoint, scores, plan, bundle, force=True)
            convert_bundle(bundle, export, force=True)
            shutil.rmtree(bundle)
            for session in known.sessions:
                predicted = plan.memory_bytes + uncounted_bytes(known, plan, checkpoint, session.runtime)
                figures = measure_process(session.module, session.name, export)
                yield row(name, types_of(plan), plan, predicted, figures)
            shutil.rmtree(export)


def types_of(plan: Plan) -> str:
    """The types of a plan's matrices, those of the most bytes first."""
    held: dict[str, int] = {}
    for decision in plan.tensors:
        if len(decision.shape) == 2:
            kind = decision.type or f"{decision.up_type} pairs"
            held[kind] = held.get(kind, 0) + decision.nbytes
    return ", ".join(sorted(held, key=lambda kind: -held[kind]))


def row(name: str, types: str, plan: Plan, predicted: int, figures: ProcessFigures) -> dict[str, Any]:
    memory = figures.memory
    assert memory is not None
    found = {
        "shape": name,
        "format": plan.format,
        "layout": plan.layout,
        "formats": types,
        "context": plan.serving.context,
        "cache_type": plan.serving.cache_types,
        "prompt_batch": plan.serving.prompt_batch,
        "runtime": figures.runtime,
        "breakdown": dict(plan.breakdown),
        "predicted": predicted,
        "measured": memory.peak_bytes,
        "anonymous": memory.anonymous_bytes,
        "mapped": memory.file_bytes,
        "interpreter": memory.interpreter_bytes,
    }
    print(
        f"{name:7} {plan.format} {plan.layout:9}{types:26}{plan.serving.context:5} {figures.runtime:28}"
        f"{format_bytes(predicted):>10} predicted {format_bytes(memory.peak_bytes):>10} measured "
        f"{predicted / memory.peak_bytes - 1:+.1%}",
        flush=True,
    )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/memory.md."""
    lines = [
        "| model | export | context, cache, batch | runtime | predicted | measured | predicted is above by |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['shape']} | {r['format']}, {r['layout']}: {r['formats']} | {r['context']}, {r['cache_type']}, "
        f"{r['prompt_batch']} | {r['runtime']} | {format_bytes(r['predicted'])} | {format_bytes(r['measured'])} | "
        f"{r['predicted'] / r['measured'] - 1:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def update_docs(rows: list[dict[str, Any]]) -> None:
    file = ROOT / "docs" / "memory.md"
    file.write_text(with_marked(file.read_text(encoding="utf-8"), "memory table", table(rows)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*CASES, REAL], default=[*CASES, REAL])
    parser.add_argument("--scratch", type=Path, help="where models are made; default: the system's temporary directory")
    parser.add_argument("--contexts", nargs="*", type=int, default=REAL_CONTEXTS, help="of the real model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "memory.json")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()
    warm_libraries()
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    for name in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
            scratch = Path(directory)
            if name == REAL:
                found = list(measure_planned(name, Checkpoint.open(real.cached().model), scratch, arguments.contexts))
            elif name == "sample":
                found = list(measure(name, Checkpoint.open(ROOT / "samples" / "llama"), scratch))
            else:
                found = list(measure(name, write_random_model(scratch / "model", SHAPES[name]), scratch))
        again = arguments.contexts if name == REAL else [row["context"] for row in found]
        rows = [r for r in rows if r["shape"] != name or r["context"] not in again] + found
    rows.sort(key=lambda row: [*CASES, REAL].index(row["shape"]))
    document = {
        "benchmark": "memory",
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in PACKAGES},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.update_docs:
        update_docs(rows)


if __name__ == "__main__":
    main()
