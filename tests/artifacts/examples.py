"""One small valid document of every kind, made without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from acip_export.artifacts.bundle import Manifest
from acip_export.artifacts.plan import (
    Alternative,
    Certificate,
    ContextCost,
    Plan,
    Refusal,
    Serving,
    TensorDecision,
    decision_bytes,
)
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import CurvePoint, ModuleScores, RankedModel, RankedOn, ScoreFile, save_scores
from acip_export.lowrank.moments import pack_moment


def _decided(draft: TensorDecision) -> TensorDecision:
    return TensorDecision(**{**vars(draft), "nbytes": decision_bytes(draft, "gguf")})


TENSORS = (
    _decided(TensorDecision("model.embed_tokens.weight", (64, 32), "dense", 0, type="q8_0")),
    _decided(
        TensorDecision(
            "model.layers.0.mlp.up_proj.weight",
            (64, 32),
            "lora",
            0,
            type="f16",
            rank=32,
            up_type="q8_0",
            down_type="q8_0",
            kept=((0, 32),),
        )
    ),
    _decided(
        TensorDecision(
            "model.layers.0.mlp.down_proj.weight",
            (32, 64),
            "factored",
            0,
            rank=8,
            up_type="f16",
            down_type="f16",
            kept=((0, 4), (10, 14)),
        )
    ),
    _decided(TensorDecision("model.norm.weight", (32,), "dense", 0, type="f32")),
)
_WEIGHTS = sum(decision.nbytes for decision in TENSORS)
PLAN = Plan(
    format="gguf",
    layout="lora",
    task="causal",
    model="tiny",
    model_fingerprint="1" * 64,
    scores_sha256="2" * 64,
    budget_bytes=10_000_000,
    budget_scope="process",
    planned_bytes=_WEIGHTS + 100,
    memory_bytes=_WEIGHTS + 1100,
    files={"model.gguf": _WEIGHTS, "1_Pooling/config.json": 100},
    breakdown={"weights": _WEIGHTS + 100, "kv_cache": 1000, "runtime_library": 5000},
    anonymous={"weights": 0, "kv_cache": 1000, "runtime_library": 2000},
    predicted_loss=0.25,
    predicted_perplexity=12.5,
    size_ratio=0.5,
    adapters=False,
    serving=Serving(64, "f16", 32),
    certificate=Certificate(
        1000,
        0.2,
        "lm_head: q8_0",
        100,
        0.3,
        (Alternative("--context 32", 0.2, 12.0),),
        (Refusal("q4_k", 1, "x", "y"),),
        (ContextCost(512, 1000, 0.2, 12.0), ContextCost(1024, 2000)),
    ),
    tensors=TENSORS,
    notes=("a note",),
    device="raspberry-pi-5-4gb",
    options={"pre_tokenizer": "llama-bpe"},
    rounding="feedback",
)
MANIFEST = Manifest(
    tool="0.1.0",
    model="tiny",
    model_fingerprint="1" * 64,
    scores_sha256="2" * 64,
    source_dtype="BF16",
    weights_sha256="3" * 64,
    importance_sha256="4" * 64,
    files={"model.safetensors": 1000},
    feedback_sha256="5" * 64,
    feedback={"model.layers.0.mlp.up_proj.down.weight": "model.layers.0.mlp"},
    row_feedback={"model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.gradient"},
)
ROUNDING_ERRORS = RoundingErrors(
    "gguf",
    "ggml 1",
    "2" * 64,
    {"a.weight": {"q8_0": 0.001, "q4_0": 0.1}},
    {"a": {"q8_0*q4_0": ((0.25, 0.4), (0.75, 0.1))}},
)


def write_scores(file: Path) -> Path:
    """A score file of one module of 3 by 2, with adapters and both second moments."""
    module = ModuleScores(
        shape=(3, 2),
        scores=np.array([2, 1], np.float32),
        drop_loss=np.array([0.2, 0.1], np.float32),
        up_sensitivity=np.ones(2, np.float32),
        down_sensitivity=np.ones(2, np.float32),
        sensitivity=1.0,
        input_moment=np.ones(2, np.float32),
        gradient_moment=np.ones(3, np.float32),
        input_key="in",
        gradient_key="out",
        adapter_a=np.ones((1, 2), np.float32),
        adapter_b=np.ones((3, 1), np.float32),
    )
    scores = ScoreFile(
        model=RankedModel("tiny", "1" * 64),
        task="causal",
        algorithm={"name": "acip", "basis": "kfac", "seed": 0, "field": None, "curve_ratios": (1.0, 0.5)},
        data=RankedOn("text.txt", "2" * 64, 100, documents=3),
        versions={"acip-export": "0.1.0"},
        curve=(CurvePoint(1.0, 3.0), CurvePoint(0.5, 4.0, 3.5)),
        modules={"model.layers.0.up": module},
        embedding_sensitivity={"model.embed_tokens.weight": 0.5},
        second_moments={key: pack_moment(torch.eye(2)) for key in ("in", "out")},
    )
    save_scores(scores, file)
    return file


DEVICES = """
[[device]]
name = "camera"
title = "Door camera"
class = "board"
memory = "1GiB"
usable = 0.4
runtimes = { gguf = "llama.cpp" }
types = { gguf = ["q8_0", "q4_0"] }
context = 512
largest_file = "2GB"
whole_prompts = ["gguf"]
source = { memory = "data sheet", usable = "measured", types = "benchmark" }
"""
CHECK = """
[[check]]
name = "phone"
path = "export/gguf"
max_bytes = "900MB"
max_growth = ["1%", "5MB"]
min_recovery = 0.95
max_load_time_ratio = 1.5
missing = "skip"
"""
