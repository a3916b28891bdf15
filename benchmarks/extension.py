"""Factor pairs against dense weights of the same type in one llama.cpp, the one with our extension: size and speed.

    make llama-cpp && python -m benchmarks.extension [--seconds 60]

A Llama of random numbers (speed does not depend on them): 2048 hidden, FFN 5632, 4 layers, one thread. All exports are
open at once and are measured in turns, so that whatever else the machine does meets all of them; the best turn counts.
Time is the thread's processor time, which waiting for a busy machine does not lengthen.
Writes benchmarks/extension.json: machine, versions, and for every export its bytes and tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from acip_export.artifacts.materialized import MaterializedModel, stored_tensors
from acip_export.artifacts.plan import Certificate, Plan, Serving, TensorDecision, decision_bytes, save_plan
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_info import TensorInfo
from acip_export.rounding.quantizer import InputMoments
from converters.gguf import converter
from converters.gguf.runtimes import c_api as llama_capi
from converters.gguf.runtimes.llama_cpp import LlamaCppSession

ROOT = Path(__file__).parent.parent
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 2048, 5632, 4, 16, 4
PROMPT, NEW = 128, 24
# Ranks of the square and of the FFN matrices; keys and values stay dense, too small to gain.
RANKS = {"half": (512, 768), "quarter": (256, 512)}
TYPES = ("q4_k", "q8_0", "q4_0")


@dataclass(frozen=True)
class RandomBundle:
    """As much of a bundle as the converter asks for."""

    path: Path
    plan: Plan
    checkpoint: Checkpoint

    def as_checkpoint(self) -> Checkpoint:
        return self.checkpoint

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        parts = (stored_tensors(d.name, d.shape, d.rank) for d in self.plan.tensors)
        return {name: shape for part in parts for name, shape in part.items()}

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return torch.randn(shape) / shape[-1] ** 0.5

    def inputs(self, _name: str) -> InputMoments:
        return InputMoments()


def checkpoint() -> Checkpoint:
    """The sample Llama's tokenizer around a larger model."""
    sample = ROOT / "samples" / "llama"
    config = json.loads((sample / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 1024,
    }
    keys = HIDDEN // HEADS * KV_HEADS
    layer = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], HIDDEN)}
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    return Checkpoint(sample, config, {name: TensorInfo(shape, "F32", "", 0, 0) for name, shape in shapes.items()})


def decide(name: str, shape: tuple[int, ...], form: str, ranks: tuple[int, int] | None, layout: str) -> TensorDecision:
    fields: dict[str, Any] = {"representation": "dense", "type": "f32" if len(shape) == 1 else form}
    if ranks is not None and len(shape) == 2 and "embed" not in name and min(shape) >= HIDDEN:
        rank = ranks[0] if shape == (HIDDEN, HIDDEN) else ranks[1]
        base = "q1_0" if layout == "lora" else None
        fields = {"representation": layout, "type": base, "rank": rank, "up_type": form, "down_type": form}
    draft = TensorDecision(name, shape, nbytes=0, **fields)
    return TensorDecision(name, shape, nbytes=decision_bytes(draft, "gguf"), **fields)


def write(model: Checkpoint, form: str, ranks: tuple[int, int] | None, layout: str, out: Path) -> int:
    """Bytes of the export's files."""
    tensors = tuple(decide(name, info.shape, form, ranks, layout) for name, info in model.tensors.items())
    runtime = Serving(512, "f16", 256)
    files = converter.predict_files(model, layout, tensors, runtime)
    total = sum(files.values())
    plan = Plan(
        format="gguf",
        layout=layout,
        task="causal",
        model="random",
        model_fingerprint="0" * 64,
        scores_sha256="0" * 64,
        budget_bytes=total,
        budget_scope="file",
        planned_bytes=total,
        memory_bytes=0,
        files=files,
        breakdown={},
        predicted_loss=0.0,
        predicted_perplexity=None,
        size_ratio=1.0,
        adapters=False,
        serving=runtime,
        certificate=Certificate(0, 0.0),
        tensors=tensors,
    )
    out.mkdir()
    save_plan(plan, out / "plan.json")
    converter.convert(cast("MaterializedModel", RandomBundle(out, plan, model)), out, lambda _: None)
    return total


def exports() -> Iterator[tuple[str, str, tuple[int, int] | None, str]]:
    """Name, type, ranks, layout."""
    for form in TYPES:
        yield f"dense {form}", form, None, "stock"
        for name, ranks in RANKS.items():
            yield f"pairs {form}, {name}", form, ranks, "factored"
    yield "base and adapter q4_k, half", "q4_k", RANKS["half"], "lora"


def seconds(session: LlamaCppSession, new: int) -> float:
    """Processor time of a prompt and ``new`` tokens; the first comes out of the prompt."""
    begin = time.thread_time()
    session.greedy(list(range(PROMPT)), new)
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of turns, for all exports together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "extension.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = checkpoint()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        sessions = {}
        for index, (name, form, ranks, layout) in enumerate(exports()):
            place = Path(scratch) / str(index)
            results[name] = {"bytes": write(model, form, ranks, layout, place)}
            session = LlamaCppSession(place, Serving(512, "f16", 256), threads=1, extended=True)
            sessions[name] = stack.enter_context(session)
            print(f"written: {name}, {results[name]['bytes']:,} bytes", flush=True)
        best = {name: (float("inf"), float("inf")) for name in sessions}
        turns, begin = 0, time.perf_counter()
        while turns < 3 or time.perf_counter() - begin < args.seconds:
            for name, session in sessions.items():
                first, all_ = seconds(session, 1), seconds(session, 1 + NEW)
                best[name] = min(first, best[name][0]), min(all_, best[name][1])
            turns += 1
        for name, (first, all_) in best.items():
            results[name] |= {"prefill": round(PROMPT / first, 1), "decode": round(NEW / (all_ - first), 1)}
        runtime = next(iter(sessions.values())).name
    for name, form, *_ in exports():
        dense = results[f"dense {form}"]
        against = {key: round(results[name][key] / dense[key], 3) for key in ("bytes", "prefill", "decode")}
        results[name]["against dense"] = against
        print(f"{name:30} {json.dumps(against)}")
    document = {
        "model": {"hidden": HIDDEN, "ffn": FFN, "layers": LAYERS, "prompt_tokens": PROMPT, "new_tokens": NEW},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1, "turns": turns},
        "versions": {"runtime": runtime, "python": platform.python_version()},
        "results": results,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not llama_capi.runs_factor_pairs():
        raise SystemExit("this needs llama.cpp with our extension:  make llama-cpp")
    main()
