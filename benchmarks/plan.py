"""How long ``acip-export plan`` takes for a model of 7 billion parameters: a new process each time, start-up included.
And how much of a budget plans use, at 135 million, 1 billion and 7 billion parameters.

    python -m benchmarks.plan [--repeat 3] [--part time use]

Makes a model directory of the shape of Llama 2 7B (32 layers, 224 linear layers; also those of SmolLM 135M and
TinyLlama 1.1B) and a score file with full second moments. The matrices and the moments are holes in sparse files:
planning reads neither, once it has the rounding errors that the first plan of a model measures and keeps (here made up
beforehand). Writes benchmarks/plan.json.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.api import planning_problem
from acip_export.artifacts.rounding_errors import (
    RoundingErrors,
    cache_file,
    pair_key,
    residual_key,
    save_rounding_errors,
)
from acip_export.artifacts.scores import (
    CurvePoint,
    ModuleScores,
    RankedModel,
    RankedOn,
    ScoreFile,
    load_scores,
    save_scores,
)
from acip_export.formats.registry import export_format, export_formats
from acip_export.io.atomic import DTYPE_BYTES
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.encoder import task_of
from acip_export.planning import Budget, DoesNotFit, PlanRequest, resolve
from acip_export.planning.candidates import pair_types, residual_bases
from acip_export.weight_types import AllowedTypes, types_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    layers: int
    hidden: int
    ffn: int
    vocabulary: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


SIZES = {
    "7B": Size(32, 4096, 11008, 32000, 32, 32),
    "1.1B": Size(22, 2048, 5632, 32000, 32, 4),
    "135M": Size(30, 576, 1536, 49152, 9, 3, tied=True),
}
# Of the bf16 bytes; for files, at the types that the layouts have by default.
SHARES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAYOUTS = {"gguf, stock": ("gguf", "stock"), "gguf, lora": ("gguf", "lora"), "onnx": ("onnx", "factored")}
# Those of the cases: the default ones, and what one of them names.
NAMED_TYPES: dict[str, tuple[tuple[str, ...], ...]] = {"gguf": ((), ("q8_0", "q4_k"))}
CASES = {
    "gguf, stock": ("--budget", "5GB", "--format", "gguf"),
    "gguf, lora": ("--budget", "5GB", "--format", "gguf", "--layout", "lora", "--types", "q8_0,q4_k"),
    "onnx, factored": ("--budget", "6GB", "--format", "onnx"),
    "gguf, on a device": ("--device", "raspberry-pi-5-8gb"),
}


def sparse_safetensors(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A well-formed file whose numbers are a hole."""
    position, header = 0, {}
    for name, (dtype, shape) in tensors.items():
        nbytes = int(np.prod(shape)) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + position)


def make_model(directory: Path, size: Size = SIZES["7B"]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(size.config))
    tokenizer = json.loads((ROOT / "samples" / "llama" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for token in range(len(vocabulary), size.vocabulary):
        vocabulary[f"token{token}"] = token
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((ROOT / "samples" / "llama" / name).read_bytes())
    table, keys = ("BF16", (size.vocabulary, size.hidden)), size.hidden // size.heads * size.kv_heads
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": table}
    if not size.tied:
        tensors["lm_head.weight"] = table
    tensors["model.norm.weight"] = ("BF16", (size.hidden,))
    for layer in range(size.layers):
        stem = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            rows = keys if name in "kv" else size.hidden
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = ("BF16", (rows, size.hidden))
        wide, narrow = (size.ffn, size.hidden), (size.hidden, size.ffn)
        for name, shape in (("gate", wide), ("up", wide), ("down", narrow)):
            tensors[f"{stem}.mlp.{name}_proj.weight"] = ("BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{name}.weight"] = ("BF16", (size.hidden,))
    sparse_safetensors(directory / "model.safetensors", tensors)
    return directory


def make_scores(model: Path) -> Path:
    """Losses that fall off as those of trained layers do; the moments of every layer, full."""
    checkpoint, draw = Checkpoint.open(model), np.random.default_rng(0)
    modules: dict[str, ModuleScores] = {}
    moments: dict[str, int] = {}
    for name, shape in checkpoint.linear_modules.items():
        loss = (10 ** draw.uniform(-7, -6) * np.geomspace(1, 1e-4, min(shape))).astype(np.float32)
        layer, kind = name.rsplit(".", 1)
        inputs = layer + (".input" if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") else f".{kind}")
        moments[inputs], moments[f"{name}.gradient"] = shape[1], min(shape)
        modules[name] = ModuleScores(
            shape=shape,
            scores=loss,
            drop_loss=loss,
            up_sensitivity=loss,
            down_sensitivity=loss,
            sensitivity=float(loss.sum()),
            input_moment=np.ones(shape[1], np.float32),
            gradient_moment=np.ones(shape[0], np.float32),
            input_key=inputs,
            gradient_key=f"{name}.gradient",
        )
    total = sum(float(module.drop_loss.sum()) for module in modules.values())
    scores = ScoreFile(
        model=RankedModel(checkpoint.name, checkpoint.fingerprint),
        task=task_of(checkpoint.config),
        algorithm={"name": "acip", "basis": "kfac", "seed": 0},
        data=RankedOn(source="none", sha256="0" * 64, tokens=0),
        versions={"acip-export": "benchmark"},
        curve=tuple(CurvePoint(r / 10, 2 + total * (1 - r / 10) ** 2) for r in range(10, 1, -1)),
        modules=modules,
        embedding_sensitivity={
            name: value
            for name, value in (("model.embed_tokens.weight", 0.05), ("lm_head.weight", 0.1))
            if name in checkpoint.tensors
        },
        second_moments={},
    )
    file = model / f"{model.name}.acip"
    save_scores(scores, file)
    add_moments(file, moments)
    return file


def add_moments(file: Path, moments: dict[str, int]) -> None:
    """Append full second moments to a score file, as holes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    position = len(content) - 8 - length
    for key, width in moments.items():
        # Six bits for each entry above the diagonal, which is what they take.
        parts = (("rows", "F32", (3, width), 12 * width), ("codes", "U8", None, width * width * 3 // 8))
        for part, dtype, shape, nbytes in parts:
            offsets = [position, position + nbytes]
            header[f"second_moment/{key}/{part}"] = {
                "dtype": dtype,
                "shape": shape or [nbytes],
                "data_offsets": offsets,
            }
            position += nbytes
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
        stream.truncate(8 + len(encoded) + position)


def make_rounding_errors(file: Path) -> None:
    """The caches that a first plan measures and leaves beside the score file; here with the table's errors."""
    scores = load_scores(file)
    for name, fmt in ((known.name, known) for known in export_formats()):
        forms = types_of(name)
        dense = {f"{module}.weight": s.sensitivity for module, s in scores.modules.items()} | dict(
            scores.embedding_sensitivity
        )
        keys = [pair_key(a.name, b.name) for a in forms for b in forms] + [residual_key(form.name) for form in forms]
        columns = {module.shape[1] for module in scores.modules.values()}
        used: set[str] = set()
        for types in NAMED_TYPES.get(name, ((),)):
            allowed = resolve(PlanRequest(name, types=types), Checkpoint.open(file.parent)).space.allowed
            used |= {pair_key(*pair) for pair in pair_types(allowed, columns)}
        every = AllowedTypes(forms)
        used |= {residual_key(base) for layout in fmt.layouts for base in residual_bases(layout, every, columns)}
        errors = RoundingErrors(
            name,
            export_format(name).quantizer(),
            scores.sha256,
            {tensor: {form.name: value * form.relative_mse for form in forms} for tensor, value in dense.items()},
            {module: {key: ((0.5, 1.0),) for key in keys if key in used} for module in scores.modules},
        )
        save_rounding_errors(errors, cache_file(file, name))


def measure(model: Path, arguments: tuple[str, ...], repeat: int) -> dict[str, Any]:
    """Wall seconds (fastest and median), processor seconds (what other work slows little), peak bytes, and the plan."""
    command = [sys.executable, "-m", "acip_export", "plan", "--model", str(model), *arguments, "--json"]
    # As installed, where modules are compiled once.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(model.parent / "compiled")
    subprocess.run(command, capture_output=True, check=False, env=environment)
    seconds, busy = [], []
    for _ in range(repeat):
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        seconds.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            raise SystemExit(done.stderr)
    plan = json.loads(done.stdout)
    used = plan["memory_bytes"] if plan["budget_scope"] == "memory" else sum(plan["breakdown"].values())
    return {
        "command": "acip-export plan " + " ".join(arguments),
        "seconds": round(min(seconds), 2),
        "processor_seconds": round(min(busy), 2),
        "seconds_median": round(sorted(seconds)[len(seconds) // 2], 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "low_rank_layers": sum(tensor.get("rank") is not None for tensor in plan["tensors"]),
        "budget_use": round(used / plan["budget_bytes"], 5),
        "bound_gap": plan["predicted_loss"] - plan["certificate"]["lower_bound"],
    }


def budget_use(model: Path) -> dict[str, Any]:
    """Used bytes over the budget, at every share of the bf16 bytes that has a plan which could still be improved."""
    checkpoint, scores = Checkpoint.open(model), load_scores(model / f"{model.name}.acip")
    found: dict[str, Any] = {}
    for name, (fmt, layout) in LAYOUTS.items():
        question = resolve(PlanRequest(fmt, layout=layout, context=512), checkpoint)
        problem = planning_problem(checkpoint, scores, question)
        used: dict[str, float] = {}
        for share in SHARES:
            budget = round(share * checkpoint.weight_bytes)
            try:
                plan = problem.plan(Budget(budget, "file"), question.rule.at_every_budget(512))
            except DoesNotFit:
                continue
            if plan.certificate.next_upgrade is not None:
                used[f"{share:.0%}"] = round(plan.used_bytes / budget, 6)
        found[name] = {"least": min(used.values()), "by_share": used}
    return found


def table(document: dict[str, Any]) -> str:
    """For docs/measurements/planning.md."""
    rows = ["| least use of a budget | " + " | ".join(LAYOUTS) + " |", "| --- |" + " ---: |" * len(LAYOUTS)]
    for name, use in document["budget_use"].items():
        cells = (f"{use[layout]['least']:.3%} of {len(use[layout]['by_share'])}" for layout in LAYOUTS)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    parser.add_argument("--part", nargs="*", choices=("time", "use"), default=("time", "use"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "plan.json")
    args = parser.parse_args()
    old = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        uses: dict[str, Any] = {}
        for name, size in reversed(SIZES.items()) if "use" in args.part else ():
            model = make_model(Path(scratch) / name, size)
            make_rounding_errors(make_scores(model))
            uses[name] = budget_use(model)
            print(f"{name:20}", json.dumps(uses[name]), flush=True)
        model = make_model(Path(scratch) / "seven")
        scores = make_scores(model)
        make_rounding_errors(scores)
        results = {}
        for name, arguments in CASES.items():
            if (args.only and name not in args.only) or "time" not in args.part:
                continue
            results[name] = measure(model, arguments, args.repeat)
            print(f"{name:20}", json.dumps(results[name]), flush=True)
        document = {
            "benchmark": "plan",
            "model": {
                "layers": SIZES["7B"].layers,
                "linear_layers": 7 * SIZES["7B"].layers,
                "bytes": Checkpoint.open(model).weight_bytes,
            },
            "score_file_bytes": scores.stat().st_size,
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "system": platform.system(),
                "load": os.getloadavg()[0],
            },
            "versions": {name: version(name) for name in ("numpy", "scipy", "typer", "rich")},
            "results": results or old.get("results", {}),
            "budget_use": uses or old.get("budget_use", {}),
        }
    if not args.only:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        print(table(document))


if __name__ == "__main__":
    main()
