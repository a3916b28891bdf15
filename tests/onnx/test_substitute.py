"""Architectures that the model builder does not know, traced by torch.onnx, against their bundles in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from acip_export.api import export_model, plan_export
from acip_export.artifacts.bundle import load_bundle
from acip_export.errors import UnsupportedError
from acip_export.formats.session import RuntimeSession, Windows
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.tensor_names import EMBEDDINGS, HEAD
from acip_export.planning import PlanRequest
from acip_export.progress import Progress
from acip_export.verification.metrics import compare_logits
from converters.onnx import converter
from converters.onnx.graph.marked import marked_graph
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from converters.onnx.tracing.decoder import traced
from tests.onnx.conftest import CONTEXT, EXACT, PROMPT_BATCH
from tests.planning.problems import EXHAUSTIVE
from tests.support import make_bundle, make_plan, make_scores, make_tokenizer

WINDOWS: Windows = np.random.default_rng(0).integers(0, 512, (2, CONTEXT))
PROMPT = [int(token) for token in WINDOWS[0][: PROMPT_BATCH + 5]]

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
CASES: dict[str, dict[str, Any]] = {
    # Learned positions, Conv1D, a tied head.
    "gpt2": {"max_position_embeddings": 64},
    # No positions but slopes of the attention, which is no exchangeable function.
    "bloom": {},
    # A part of each head is rotated, parallel blocks, an untied head.
    "gpt_neox": {"max_position_embeddings": 64, "intermediate_size": 96, "rotary_pct": 0.25},
    # One key head for all queries, plain attention.
    "falcon": {"max_position_embeddings": 64, "multi_query": True, "alibi": False},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    # Logits are scaled, norms have no bias.
    "cohere": {"intermediate_size": 96, "num_key_value_heads": 2, "logit_scale": 1.0},
    "stablelm": {"intermediate_size": 96, "num_key_value_heads": 2},
}
# Two that differ in everything; tracing takes ten seconds of a processor for each.
RUN = tuple(CASES) if EXHAUSTIVE else ("gpt2", "bloom")


def make_other(directory: Path, kind: str, **overrides: Any) -> Path:
    """A random model with its tokenizer; weights and biases large enough to be missed."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("qwen2")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, **{**SMALL, **CASES[kind], **ids, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.5 / min(parameter.shape) ** 0.5
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def float_pairs(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
    if not in_layer(name) or "dense_h_to_4h" in name:
        return {"representation": "dense", "type": "f32"}
    return {"representation": "factored", "rank": 32, "up_type": "f32", "down_type": "f32"}


def mixed(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
    if name.endswith((*EMBEDDINGS, HEAD)):
        return {"representation": "dense", "type": "int8"}
    if not in_layer(name):
        return {"representation": "dense", "type": "f32"}
    if "attn" in name or "attention" in name:
        return {"representation": "factored", "rank": 32, "up_type": "int8", "down_type": "int4-b64"}
    return {"representation": "dense", "type": "int4"}


def in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


@pytest.mark.parametrize("kind", RUN)
def test_runtimes_agree_with_the_bundle(tmp_path: Path, kind: str) -> None:
    model = make_other(tmp_path / "m", kind)
    checkpoint = Checkpoint.open(model)
    for rule in (float_pairs, mixed):
        place = tmp_path / rule.__name__
        plan = make_plan(model, "onnx", "factored", rule, CONTEXT, PROMPT_BATCH)
        bundle = make_bundle(model, plan, place / "b")
        (place / "e").mkdir()
        converter.convert(bundle, place / "e", lambda _: None, EXACT)
        reference = load_bundle(bundle.path, converter.round_trip)
        with torch.no_grad():
            expected = list(reference(input_ids=torch.from_numpy(WINDOWS)).logits.numpy())
        # The tolerance below means something only if the logits are of this order.
        assert 0.1 < np.std(expected) < 10
        sessions: list[RuntimeSession] = [
            OnnxRuntimeSession(place / "e", plan.serving, threads=1),
            GenaiSession(place / "e", plan.serving),
        ]
        greedy = [session.greedy(PROMPT, 20) for session in sessions]
        for session in sessions:
            agreement = compare_logits(expected, session.logits(WINDOWS), (greedy[0], greedy[1]))
            # Float32 sums in another order, by a graph that fuses nothing.
            assert agreement.max_logit_difference <= 1e-4
            assert agreement.greedy_equal == 20
        written = {
            file.relative_to(place / "e").as_posix(): file.stat().st_size
            for file in (place / "e").rglob("*")
            if file.is_file()
        }
        assert written == converter.predict_files(checkpoint, plan.layout, plan.tensors, plan.serving)
    nodes = marked_graph(traced(checkpoint.config, CONTEXT)).graph.node
    attends = sum(node.op_type == "GroupQueryAttention" for node in nodes)
    assert attends == (checkpoint.shape.layers if checkpoint.shape.fused_attention else 0)


@pytest.mark.slow
def test_another_process_traces_the_same_bytes(tmp_path: Path) -> None:
    """A plan's bytes are those of the graph that another process writes."""
    checkpoint = Checkpoint.open(make_other(tmp_path / "m", "gpt2"))
    script = (
        "import sys; from acip_export.model.checkpoint import Checkpoint\n"
        "from converters.onnx.graph.marked import marked_graph\n"
        "from converters.onnx.tracing.decoder import traced\n"
        f"graph = marked_graph(traced(Checkpoint.open(sys.argv[1]).config, {CONTEXT}))\n"
        "sys.stdout.buffer.write(graph.SerializeToString(deterministic=True))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, checkpoint.path],
        env={**os.environ, "PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        check=True,
    )
    assert list((tmp_path / "cache").rglob("*.onnx"))
    ours = marked_graph(traced(checkpoint.config, CONTEXT))
    assert other.stdout == ours.SerializeToString(deterministic=True)


def test_from_a_budget_to_a_verified_export(tmp_path: Path) -> None:
    model = make_other(tmp_path / "m", "gpt2")
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    seen: list[Progress] = []
    request = PlanRequest("onnx", 200_000, "file", types=("int8", "int4"), context=CONTEXT)
    plan = plan_export(checkpoint, scores, request, seen.append)
    assert [p.item for p in seen if p.stage == "graph"] == ["GPT2LMHeadModel"] * 2
    assert any(note.startswith("through torch.onnx.export") for note in plan.notes)
    report = export_model(checkpoint, scores, plan, tmp_path / "e", sizes=(plan,))
    assert report is not None and report.passed and report.structure is not None
    assert report.structure.found == report.structure.tensors > 0
    assert report.written_bytes == plan.planned_bytes <= 200_000
    assert [runtime.memory is None or runtime.memory.peak_bytes > 0 for runtime in report.runtimes] == [True, True]
    assert "through torch.onnx.export" in (tmp_path / "e" / "report.html").read_text(encoding="utf-8").replace(
        "Through", "through"
    )


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        # Its convolutions and states are nothing that a plan decides about.
        ("mamba", {}, "is the weight of no linear layer"),
        ("gpt2", {"backend": "cuda"}, "for --backend cpu or mobile, not cuda"),
    ],
)
def test_what_cannot_be_traced_is_refused(tmp_path: Path, kind: str, sizes: dict[str, Any], reason: str) -> None:
    backend = sizes.pop("backend", "cpu")
    config = {**SMALL, "model_type": kind, "tie_word_embeddings": True, "intermediate_size": 128, **sizes}
    checkpoint = Checkpoint(tmp_path, config, {})
    with pytest.raises(UnsupportedError, match=reason) as raised:
        converter.prepare(checkpoint, backend, CONTEXT, lambda _: None)
    assert raised.value.exit_code == 5
